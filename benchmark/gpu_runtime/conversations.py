"""What retained conversations gain on one Hopper GPU: the time to a later turn's first token, with the prefix cache on and off.

    python -m benchmark.gpu_runtime.conversations OUT_DIR [--one-gpu] [--model qwen3-30b-a3b] [--layers 4] [--tokens 100000] [--dry]

Two servers of two instances, one after the other: the same flags but --dyncp-cache-fraction. Each answers a long prompt, then the same with
2,000 tokens more, at degree 2; then a closed loop of conversations, one request of each at a time; then decodes of which nobody is sharded
and nothing is retained. Writes OUT_DIR/conversations.json after every part. --dry: the tiny test model on a CPU, lengths divided.

--loop-degree pins the loop's conversations, homes in turns: then all are of the kind that SGLang's own tree cannot keep. Unpinned, the
router may leave them whole, and the server without retained sequences finds them in that tree.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmark.gpu_runtime.loads import Load, run_load
from benchmark.multi_gpu.model_shapes import model_flags, write_shape
from benchmark.multi_gpu.servers import ROOT, GpuServer, running
from benchmark.multi_gpu.settings import read_device_facts, set_environment
from benchmark.multi_gpu.streams import Streamed, stream
from benchmark.serving.provenance import provenance
from testing.gpu.answers import pinned, prompt
from testing.gpu.servers import port_range
from testing.ports import find_free_port

INSTANCES, CONVERSATIONS, OUTPUT = 2, 12, 16
FRACTIONS = {"off": "0", "on": "0.9"}


def build_server(args: argparse.Namespace, name: str) -> GpuServer:
    flags: tuple[str, ...] = ("--dyncp-cache-fraction", FRACTIONS[name], "--stream-interval", "1")
    if args.dry:
        flags += ("--page-size", "16")
        return GpuServer(name, ROOT / "testing/models/qwen3moe", INSTANCES, 4096, True, flags, device="cpu")
    flags += ("--context-length", "131072", "--page-size", "64", "--load-format", "dummy", "--mem-fraction-static", "0.85")
    flags += ("--attention-backend", "flashinfer", "--cuda-graph-max-bs-decode", "32", *model_flags(args.model))
    path = write_shape(args.model, args.layers, args.out / "models")
    server = GpuServer(name, path, INSTANCES, args.pool, True, flags, one_gpu=args.one_gpu)
    server.chunk_tokens = 8192
    return server


def second_turn(server: GpuServer, tokens: int, more: int) -> dict[str, Any]:
    """Seconds to the first token of a prompt and of the same prompt with `more` tokens behind it. A warm-up of other tokens goes ahead."""
    sampling = pinned(INSTANCES, 0)
    for seed in (1, 2):
        first, second = prompt(tokens, seed), prompt(tokens, seed) + prompt(more, 10 + seed)
        answers = [stream(server.client, ids, OUTPUT, sampling) for ids in (first, second)]
    times, cached = [answer.first_token_s for answer in answers], [answer.meta.get("cached_tokens", 0) for answer in answers]
    return {"tokens": tokens, "more": more, "ttft_s": times, "cached_tokens": cached, "ratio": round(times[1] / times[0], 4)}


def converse(server: GpuServer, number: int, first: int, more: int, turns: int, degree: int | None) -> list[Streamed]:
    """One conversation, a turn after the other; each turn sends all of the turn before and more. degree: None leaves it, and the home, to
    the router."""
    answers, ids = [], prompt(first, 100 + number)
    for turn in range(turns):
        answers.append(stream(server.client, ids, OUTPUT, pinned(degree, number % INSTANCES) if degree else {}))
        ids = ids + prompt(more, 1000 * (turn + 1) + number)
    return answers


def closed_loop(server: GpuServer, first: int, more: int, turns: int, degree: int | None) -> dict[str, Any]:
    """CONVERSATIONS at once, of lengths that differ, and all their turns' seconds to the first token."""
    lengths = [first * (6 + number) // 12 for number in range(CONVERSATIONS)]
    with ThreadPoolExecutor(CONVERSATIONS) as pool:
        done = list(pool.map(lambda number: converse(server, number, lengths[number], more, turns, degree), range(CONVERSATIONS)))
    later = [answer for answers in done for answer in answers[1:]]
    every = [answer for answers in done for answer in answers]
    asked, cached = (sum(values) for values in zip(*((a.prompt_tokens, a.meta.get("cached_tokens", 0)) for a in every), strict=True))
    return {
        "first_prompts": lengths,
        "more": more,
        "turns": turns,
        "degree": degree,
        "ttft_median_s": statistics.median(answer.first_token_s for answer in every),
        "ttft_later_median_s": statistics.median(answer.first_token_s for answer in later),
        "hit_share": round(cached / asked, 4),
    }


def measure(server: GpuServer, args: argparse.Namespace) -> dict[str, Any]:
    """All parts on one server; the decodes first, while nothing is retained."""
    found: dict[str, Any] = {"ready_s": server.ready_s}
    scale = 64 if args.dry else 1
    if not args.only_loop:
        load = Load(4, 0, 64, 24) if args.dry else Load(16, 0, 1024, 400)
        found["unsharded_step_ms"] = [
            run_load(server.client, load, INSTANCES, seed, dyncp=True)["step_ms"] for seed in range(1 if args.dry else 4)
        ]
        found["second_turn"] = second_turn(server, args.tokens // scale, 2000 // scale)
    found["closed_loop"] = closed_loop(server, 30_000 // scale, 2000 // scale, args.turns, args.loop_degree)
    return found


def summary(servers: dict[str, Any]) -> dict[str, Any]:
    on, off = servers["on"], servers["off"]
    found = {
        "ttft_median_over_off": round(on["closed_loop"]["ttft_median_s"] / off["closed_loop"]["ttft_median_s"], 4),
        "ttft_later_median_over_off": round(on["closed_loop"]["ttft_later_median_s"] / off["closed_loop"]["ttft_later_median_s"], 4),
    }
    if "second_turn" in on:
        found["ttft_second_over_first"] = on["second_turn"]["ratio"]
        found["idle_step_ratio"] = round(statistics.median(on["unsharded_step_ms"]) / statistics.median(off["unsharded_step_ms"]), 4)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--one-gpu", action="store_true", help="both instances on GPU 0")
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--model", default="qwen3-30b-a3b")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--loop-degree", type=int, help="of every conversation of the loop (default: the router chooses)")
    parser.add_argument("--turns", type=int, default=3, help="of every conversation of the loop")
    parser.add_argument("--only-loop", action="store_true", help="nothing but the loop")
    parser.add_argument("--pool", type=int, default=600_000, help="KV tokens of an instance")
    parser.add_argument("--start-seconds", type=float, default=240.0)
    parser.add_argument("--commit", help="what is measured, where git cannot tell")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    set_environment()
    result = provenance(" ".join(["python", "-m", "benchmark.gpu_runtime.conversations", *sys.argv[1:]]))
    result["commit"] = args.commit or result["commit"]
    if not args.dry:
        result["machine"] = f"{1 if args.one_gpu else INSTANCES} x {read_device_facts()['names'][0]}"
    result |= {"model": args.model, "layers": args.layers, "servers": {}}
    for number, name in enumerate(FRACTIONS):
        server = build_server(args, name)
        with running(server, args.out, find_free_port(*port_range(number)), time.monotonic() + args.start_seconds):
            result["servers"][name] = measure(server, args)
        (args.out / "conversations.json").write_text(json.dumps(result, indent=1) + "\n")
    result |= summary(result["servers"])
    (args.out / "conversations.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
