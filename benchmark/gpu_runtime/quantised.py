"""What FP8 K/V gains on one Hopper GPU: attention time of a decode, tokens of a pool, bytes of the exchange. Ratios to bfloat16, in turns.

    python -m benchmark.gpu_runtime.quantised OUT_DIR [--model qwen3-30b-a3b] [--layers 4] [--commit ID] [--without-servers]

Writes OUT_DIR/fp8.json. Servers (two instances on the GPU, one server after the other) only start: SGLang logs what their pools hold.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmark.multi_gpu.model_shapes import model_flags, write_shape
from benchmark.multi_gpu.servers import GpuServer, running
from benchmark.multi_gpu.settings import set_environment
from benchmark.serving.provenance import provenance
from sglang_dcp.dataflow.measure.decode_rows import PAGE, Case, DecodeShape, measure
from testing.gpu.servers import port_range
from testing.ports import find_free_port

INSTANCES, HEAD_DIM = 2, 128
ROWS, TOKENS, ROUNDS = 32, 131_072, 5
CASE = Case(ROWS, TOKENS, padding=0)
HEADS = {"qwen3-235b": (64, 4), "qwen3-30b": (32, 4), "64 heads, 8 K/V heads": (64, 8)}
GROUPED = {name: DecodeShape(*heads, kernel="fa3") for name, heads in HEADS.items()}
FLASHINFER = {name: DecodeShape(*heads) for name, heads in HEADS.items()}
LATENT = {f"{heads} heads": DecodeShape(heads, latent=True, kernel="flashmla") for heads in (16, 64, 128)}
FP8 = torch.float8_e4m3fn
UNBOUNDED_TOKENS = 1 << 30
POOL = re.compile(r"max_total_num_tokens=(\d+)")


def in_turns(shape: DecodeShape) -> dict[str, Any]:
    """Microseconds of a layer's decode of ROWS rows of TOKENS tokens, by element type of the pool; rounds take turns. The kernel is that
    of graphs with sharded rows; fa3's and FlashMLA's take FP8 queries over an FP8 pool, which is part of the time with fa3's."""
    times: dict[str, list[float]] = {"bfloat16": [], "float8_e4m3fn": []}
    for _ in range(ROUNDS):
        for name, quantised in (("bfloat16", False), ("float8_e4m3fn", True)):
            times[name].append(next(measure(dataclasses.replace(shape, quantised=quantised), math.inf, [CASE]))[1])
            torch.cuda.empty_cache()
    ratios = sorted(quantised / plain for plain, quantised in zip(*times.values(), strict=True))
    return {"us": times, "ratio": round(ratios[len(ratios) // 2], 4)}


def attention(result: dict[str, Any]) -> None:
    """`attention_ratio`: the largest of GQA by the kernel that a server runs where nobody names one. The others: FlashInfer's, and MLA."""
    for key, ratio, shapes in (
        ("default_attention", "attention_ratio", GROUPED),
        ("attention", "flashinfer_attention_ratio", FLASHINFER),
        ("latent_attention", "latent_attention_ratio", LATENT),
    ):
        result[key] = {name: in_turns(shape) for name, shape in shapes.items()}
        result[ratio] = max(part["ratio"] for part in result[key].values())
        print(ratio, result[ratio], flush=True)


def pools(args: argparse.Namespace) -> dict[str, Any]:
    """Tokens that an instance's pool holds at one memory fraction."""
    path = write_shape(args.model, args.layers, args.out / "models")
    flags = ("--context-length", "131072", "--page-size", str(PAGE), "--load-format", "dummy", "--mem-fraction-static", "0.4")
    flags += ("--attention-backend", "flashinfer", "--cuda-graph-max-bs-decode", "4", *model_flags(args.model))
    found: dict[str, Any] = {"memory_fraction": 0.4, "layers": args.layers}
    for number, dtype in enumerate(("bfloat16", "fp8_e4m3")):
        server = GpuServer(dtype, path, INSTANCES, UNBOUNDED_TOKENS, True, (*flags, "--kv-cache-dtype", dtype), one_gpu=True)
        server.chunk_tokens = 8192
        with running(server, args.out, find_free_port(*port_range(number)), time.monotonic() + 240):
            found[dtype] = min(int(tokens) for tokens in POOL.findall(server.log()))
    return found | {"ratio": round(found["fp8_e4m3"] / found["bfloat16"], 4)}


def exchange() -> dict[str, Any]:
    """Bytes of a K/V row that travels."""
    from sglang_dcp.dataflow.attention.paged_attention import AttentionShape
    from sglang_dcp.dataflow.graph.graph_attention import GraphSizes

    sizes = GraphSizes(INSTANCES, 8, (4, 16), PAGE, 64, 100)
    rows = {}
    for name, quantised in (("bfloat16", None), ("float8_e4m3fn", FP8)):
        shape = AttentionShape(*HEADS["qwen3-235b"], HEAD_DIM, HEAD_DIM, torch.bfloat16, HEAD_DIM**-0.5, False, quantised=quantised)
        rows[name] = sizes.exchange(shape).kv_row_elements * shape.dtype.itemsize
    return {"bytes": rows, "ratio": rows["float8_e4m3fn"] / rows["bfloat16"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="qwen3-30b-a3b")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--commit", help="what is measured, where git cannot tell")
    parser.add_argument("--without-servers", action="store_true", help="kernels and bytes alone")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    set_environment()
    result = provenance(" ".join(["python", "-m", "benchmark.gpu_runtime.quantised", *sys.argv[1:]]))
    result |= {"commit": args.commit or result["commit"], "machine": f"1 x {torch.cuda.get_device_name()}"}
    result["exchange"] = exchange()
    attention(result)
    torch.cuda.empty_cache()
    (args.out / "fp8.json").write_text(json.dumps(result, indent=1) + "\n")
    if not args.without_servers:
        result["pools"] = pools(args)
        result["pool_ratio"] = result["pools"]["ratio"]
    (args.out / "fp8.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
