"""Inter-token times of two instances that decode what prefill servers computed, over those of the same two that also prefill it.

    python -m benchmark.gpu_runtime.disaggregated OUT_DIR [--one-gpu] [--layers 12] [--rate 1.5] [--long 0.1] [--seconds 45] [--dry]

Two servers with --enable-dyncp, one after the other: the same pools, flags and arrivals of mixed lengths; one is started with
`--disaggregation-mode decode` and SGLang's fake transfer, so that its K/V are what the pool holds. Writes OUT_DIR/pd.json after each:
`itl_p99_over_aggregated`, of the times between two events of a stream; `sharded_graph_share`, of the decode server's steps with sharded
rows those that ran as graphs. --dry: the tiny test model on a CPU, without graphs.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from benchmark.headline.client import Served, send_all
from benchmark.headline.contenders import FAKE_PREFILL
from benchmark.headline.judge import percentile
from benchmark.headline.traffic import arrivals
from benchmark.multi_gpu.model_shapes import LONGEST_CONTEXT, model_flags, write_shape
from benchmark.multi_gpu.servers import ROOT, WITHOUT_PREFILL, GpuServer, running
from benchmark.multi_gpu.settings import read_device_facts, set_environment
from benchmark.serving.provenance import provenance
from testing.gpu.answers import step_counts
from testing.gpu.servers import port_range
from testing.machine_lock import machine_lock
from testing.ports import find_free_port

INSTANCES, GRAPH_SIZES = 2, (1, 2, 4, 8, 16, 32, 64)
MOST_RATIO = 1 / 3
"""Of the decode server's P99 over the aggregated one's."""
SERVERS = {"aggregated": (), "decode": WITHOUT_PREFILL}


def build_server(args: argparse.Namespace, name: str) -> GpuServer:
    flags: tuple[str, ...] = ("--stream-interval", "1", *SERVERS[name])
    if args.dry:
        return GpuServer(name, ROOT / "testing/models/qwen3moe", INSTANCES, 4096, True, ("--page-size", "16", *flags), device="cpu")
    flags += ("--context-length", str(LONGEST_CONTEXT), "--page-size", "64", "--load-format", "dummy", "--mem-fraction-static", "0.85")
    flags += ("--max-running-requests", str(GRAPH_SIZES[-1] * INSTANCES), "--cuda-graph-max-bs-decode", str(GRAPH_SIZES[-1]))
    flags += ("--cuda-graph-bs-decode", *map(str, GRAPH_SIZES), *model_flags(args.model))
    flags += ("--dyncp-cost-model", args.cost_model) if args.cost_model else ()
    path = write_shape(args.model, args.layers, args.out / "models")
    server = GpuServer(name, path, INSTANCES, args.pool, True, flags, one_gpu=args.one_gpu)
    server.chunk_tokens = 8192
    return server


def describe(served: Sequence[Served], steps: Mapping[str, float]) -> dict[str, Any]:
    """Of one server: what its clients saw, in ms, and what its steps ran as."""
    gaps = [1000 * (second - first) for one in served for first, second in itertools.pairwise(one.event_s)]
    waits = [one.first_s - one.sent_s for one in served if one.first_s is not None]
    return {
        "requests": len(served),
        "longest_prompt": max(one.arrival.prompt_tokens for one in served),
        "itl_ms": {name: round(percentile(gaps, share), 3) for name, share in (("p50", 0.5), ("p99", 0.99), ("max", 1.0))},
        "ttft_s": {name: round(percentile(waits, share), 3) for name, share in (("p50", 0.5), ("p99", 0.99))},
        "degrees": dict(sorted(Counter(one.degree for one in served if one.error is None).items())),
        "steps": dict(steps),
        "failed": dict(Counter(one.error for one in served if one.error is not None).most_common(3)),
    }


def conclude(servers: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The figures and what they must be. A decode server prefills nothing, so its eager steps are decode steps with sharded rows."""
    decode, aggregated = servers["decode"], servers["aggregated"]
    graphs, eager = decode["steps"]["sharded_graph"], decode["steps"]["eager"]
    share = graphs / (graphs + eager) if graphs + eager else None
    ratio = round(decode["itl_ms"]["p99"] / aggregated["itl_ms"]["p99"], 4)
    served = not decode["failed"] and not aggregated["failed"] and max(decode["degrees"]) > 1
    bars = {"sharded_graph_share": share == 1.0, "itl_p99_over_aggregated": ratio <= MOST_RATIO, "served": served}
    return {"sharded_graph_share": share, "itl_p99_over_aggregated": ratio, "bars": bars}


def measure(server: GpuServer, args: argparse.Namespace, name: str) -> dict[str, Any]:
    """The arrivals once to warm up, for a fifth of the time, and once measured."""
    fields = FAKE_PREFILL if name == "decode" else {}
    url, longest, longest_output = f"http://127.0.0.1:{server.port}", args.longest, args.longest_output
    for seed, seconds in ((args.seed + 1, args.seconds / 5), (args.seed, args.seconds)):
        before = step_counts(server)
        drawn = arrivals(args.long, args.rate, seconds, seed, longest, longest_output)
        served = asyncio.run(send_all(url, drawn, seed=seed, timeout_s=args.seconds + 120, fields=fields))
    after = step_counts(server)
    return describe(served, {kind: after[kind] - before[kind] for kind in after}) | {"ready_s": server.ready_s}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--one-gpu", action="store_true", help="both instances on GPU 0")
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--model", default="qwen3-30b-a3b")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--pool", type=int, default=600_000, help="KV tokens of an instance")
    parser.add_argument("--cost-model", help="constants of another machine; cpu: whatever is long enough is sharded")
    parser.add_argument("--rate", type=float, default=1.5, help="requests per second")
    parser.add_argument("--long", type=float, default=0.1, help="share of long prompts")
    parser.add_argument("--longest", type=int, default=200_000, help="longest prompt")
    parser.add_argument("--longest-output", type=int, default=800)
    parser.add_argument("--seconds", type=float, default=45.0, help="of arrivals")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--start-seconds", type=float, default=240.0)
    parser.add_argument("--commit", help="what is measured, where git cannot tell")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    set_environment()
    found: dict[str, Any] = provenance(" ".join(["python", "-m", "benchmark.gpu_runtime.disaggregated", *sys.argv[1:]]))
    found["commit"] = args.commit or found["commit"]
    if args.dry:
        args.longest, args.longest_output, args.seconds = 3000, 40, min(args.seconds, 10.0)
    else:
        found["machine"] = f"{1 if args.one_gpu else INSTANCES} x {read_device_facts()['names'][0]}"
    keys = ("model", "layers", "pool", "rate", "long", "longest", "longest_output", "seconds", "seed")
    found |= {key: vars(args)[key] for key in keys} | {"servers": {}}
    path = args.out / "pd.json"
    for number, name in enumerate(SERVERS):
        server = build_server(args, name)
        lock = machine_lock() if args.dry else nullcontext()
        with lock, running(server, args.out, find_free_port(*port_range(number)), time.monotonic() + args.start_seconds):
            found["servers"][name] = measure(server, args, name)
        print(name, json.dumps(found["servers"][name]), flush=True)
        path.write_text(json.dumps(found, indent=1) + "\n")
    found |= conclude(found["servers"])
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(conclude(found["servers"])), flush=True)
    return 0 if all(found["bars"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
