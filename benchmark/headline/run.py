"""The comparison, in parts of some minutes, resumable: what a file has already is not measured again.

    python -m benchmark.headline.run OUT_DIR --contenders stock,ours --long 0.03,0 --rates 4,6,8/8,12 [--seconds 45] [--end 540]

Writes OUT_DIR/headline.json after every rate. One server at a time, so that nobody shares the GPUs, and one start of it for all mixes
(--long), each with its own rates; equal arrivals for all.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmark.headline.client import Arrival, send_all
from benchmark.headline.contenders import Contender, contenders
from benchmark.headline.judge import Point, point
from benchmark.headline.predict import add_predictions
from benchmark.headline.traffic import arrivals
from benchmark.multi_gpu.model_shapes import LONGEST_CONTEXT, model_flags, write_shape
from benchmark.multi_gpu.servers import ROOT, GpuServer, running
from benchmark.multi_gpu.settings import read_device_facts, set_environment
from benchmark.serving.provenance import provenance
from testing.machine_lock import machine_lock
from testing.ports import find_free_port

PAGE, GRAPH_SIZES = 64, (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128)
WARM_UP = [Arrival(0.0, 300, 40), Arrival(0.1, 9000, 40), Arrival(0.2, 70_000, 40), Arrival(0.3, 200, 40)]
DRY_WARM_UP = [Arrival(0.0, 100, 8), Arrival(0.1, 300, 8)]


@dataclass(frozen=True)
class Mix:
    """long_share: of long prompts. rates: requests per second, rising."""

    long_share: float
    rates: tuple[float, ...]


def parse_mixes(shares: str, rates: str) -> list[Mix]:
    """`0.03,0` and `4,6/8,12`: a list of rates for each share, or one for all. ValueError where they do not fit each other."""
    lists = [tuple(sorted(float(rate) for rate in part.split(","))) for part in rates.split("/")]
    values = [float(share) for share in shares.split(",")]
    if len(lists) not in (1, len(values)):
        raise ValueError(f"--rates {rates}: {len(lists)} lists for the {len(values)} shares of --long {shares}")
    return [Mix(share, lists[index % len(lists)]) for index, share in enumerate(values)]


def build_server(contender: Contender, args: argparse.Namespace) -> GpuServer:
    """The contender's server with the layers of a real model; in the dry form the tiny test model on a CPU."""
    if args.dry:
        flags = ("--page-size", "16", "--stream-interval", "4", *contender.flags)
        flags = tuple("torch_native" if flag == "fa3" else flag for flag in flags)
        return GpuServer(contender.name, ROOT / "testing/models/qwen3moe", args.gpus, args.pool, contender.dyncp, flags, device="cpu")
    path = write_shape(args.model, args.layers, args.out / "models")
    flags = ("--context-length", str(LONGEST_CONTEXT), "--page-size", str(PAGE), "--load-format", "dummy", "--mem-fraction-static", "0.9")
    flags += ("--max-running-requests", str(GRAPH_SIZES[-1] * args.gpus), "--cuda-graph-max-bs-decode", str(GRAPH_SIZES[-1]))
    flags += ("--cuda-graph-bs-decode", *map(str, GRAPH_SIZES), "--stream-interval", "8", *model_flags(args.model), *contender.flags)
    server = GpuServer(contender.name, path, args.gpus, args.pool, contender.dyncp, flags)
    server.chunk_tokens = 65_536
    return server


class BalanceProbe(threading.Thread):
    """Asks for the instances' KV tokens every second, until it is stopped: maximum over mean, where anybody holds any."""

    def __init__(self, server: GpuServer) -> None:
        super().__init__(daemon=True)
        self.server, self.stopped = server, threading.Event()
        self.samples: list[float] = []

    def run(self) -> None:
        while not self.stopped.wait(1.0):
            loads = self.server.client.json("GET", "/v1/loads")["loads"]
            tokens = [float(load["num_used_tokens"]) for load in loads]
            if sum(tokens):
                self.samples.append(max(tokens) / (sum(tokens) / len(tokens)))


def measure(server: GpuServer, contender: Contender, args: argparse.Namespace, long_share: float, rate: float) -> Point:
    """One rate: arrivals, answers, balance; what the server counted of its steps."""
    drawn = arrivals(long_share, rate, args.seconds, args.seed, args.longest, args.longest_output)
    probe = BalanceProbe(server)
    probe.start()
    url = f"http://127.0.0.1:{server.port}"
    limit_s = args.seconds * 2 + 60
    served = asyncio.run(send_all(url, drawn, seed=args.seed, timeout_s=limit_s, fields=contender.fields))
    probe.stopped.set()
    return point(served, rate, probe.samples)


def run_contender(contender: Contender, args: argparse.Namespace, cases: dict[str, Any], save: Callable[[], None]) -> None:
    """What of the mixes is not in `cases` ("share|seed" -> contender -> case), on one server."""
    left = []
    for mix in args.mixes:
        case = cases.setdefault(f"{mix.long_share:g}|{args.seed}", {}).setdefault(
            contender.name, {"what": contender.what, "flags": list(contender.flags), "points": []}
        )
        done = {found["requests_per_s"] for found in case["points"]}
        if rates := tuple(rate for rate in mix.rates if rate not in done):
            left.append((Mix(mix.long_share, rates), case))
    if not left or time.monotonic() > args.ends - args.seconds - 60:
        return
    server = build_server(contender, args)
    try:
        with running(server, args.out, find_free_port(), min(args.ends, time.monotonic() + args.start_limit)):
            warm = DRY_WARM_UP if args.dry else WARM_UP
            asyncio.run(send_all(f"http://127.0.0.1:{server.port}", warm, seed=7, timeout_s=300, fields=contender.fields))
            for mix, case in left:
                measure_rates(server, contender, args, mix, case, save)
    except (RuntimeError, OSError) as error:
        left[0][1].setdefault("notes", []).append(f"{type(error).__name__}: {error}"[:1500])
        print(contender.name, left[0][1]["notes"][-1], flush=True)
    finally:
        save()


def measure_rates(
    server: GpuServer, contender: Contender, args: argparse.Namespace, mix: Mix, case: dict[str, Any], save: Callable[[], None]
) -> None:
    """One rate after the other, until one is too much or the time is over. Each is saved as it is found."""
    for rate in mix.rates:
        if time.monotonic() > args.ends - 1.6 * args.seconds:
            case.setdefault("notes", []).append(f"no time left for {rate:g} requests/s")
            return
        found = measure(server, contender, args, mix.long_share, rate)
        case["points"].append(found)
        print(contender.name, f"{mix.long_share:g} long", json.dumps(found), flush=True)
        save()
        if found["failed"] or found["p99_ttft_s"] > 30 or found["p99_tpot_ms"] > args.stop_ms:
            return


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--contenders", default="stock,whole,ours", help="in this order; names of contenders.py")
    parser.add_argument("--long", default="0.03", help="shares of long prompts, one mix each")
    parser.add_argument("--rates", default="4,6,8,10,12", help="requests per second; between mixes a slash, or the same for all")
    parser.add_argument("--seconds", type=float, default=45.0, help="of arrivals at one rate")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--model", default="qwen3-30b-a3b")
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--pool", type=int, default=786_432, help="KV tokens per instance")
    parser.add_argument("--longest", type=int, default=400_000, help="longest prompt, so that one pool holds it")
    parser.add_argument("--longest-output", type=int, default=4096)
    parser.add_argument("--stop-ms", type=float, default=150.0, help="higher rates are not tried beyond this P99 TPOT")
    parser.add_argument("--start-limit", type=float, default=300.0)
    parser.add_argument("--end", type=float, default=540.0, help="seconds for everything")
    parser.add_argument("--dry", action="store_true", help="the tiny test model on a CPU: shows that it runs, its times mean nothing")
    parser.add_argument("--commit", help="what is measured, where git cannot tell")
    args = parser.parse_args()
    args.mixes = parse_mixes(args.long, args.rates)
    args.ends = time.monotonic() + args.end
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "headline.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {"cases": {}}
    found |= provenance(" ".join(["python", "-m", "benchmark.headline.run", *sys.argv[1:]]))
    found["commit"] = args.commit or found["commit"]
    if not args.dry:
        set_environment()
        found["machine"] = f"{args.gpus} x {read_device_facts()['names'][0]}"
    found |= {"model": args.model, "layers": args.layers, "pool_tokens": args.pool}
    found |= {"longest": args.longest, "longest_output": args.longest_output}
    known = contenders(args.gpus)
    with machine_lock() if args.dry else nullcontext():
        for name in args.contenders.split(","):
            run_contender(known[name], args, found["cases"], lambda: path.write_text(json.dumps(found, indent=1)))
    if not args.dry:
        add_predictions(found)
        path.write_text(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
