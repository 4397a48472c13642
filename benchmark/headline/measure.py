"""One point: a contender's server, the arrivals of a rate, and what was seen until the server is empty again."""

from __future__ import annotations

import argparse
import asyncio
import threading
import time
from typing import Any

from benchmark.headline.client import Arrival, send_all
from benchmark.headline.contenders import REAL_PREFILL, Contender
from benchmark.headline.judge import WARM_WINDOW_SHARE, Point, graph_share, point, window_point
from benchmark.headline.plan import Unit
from benchmark.headline.traffic import arrivals
from benchmark.multi_gpu.model_shapes import LONGEST_CONTEXT, model_flags, write_shape
from benchmark.multi_gpu.servers import ROOT, GpuServer

PAGE, GRAPH_SIZES = 64, (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128)
WARM_UP = [Arrival(0.0, 300, 40), Arrival(0.1, 9000, 40), Arrival(0.2, 70_000, 40), Arrival(0.3, 200, 40)]
DRY_WARM_UP = [Arrival(0.0, 100, 8), Arrival(0.1, 300, 8)]
EMPTY_LIMIT_S = 20.0
"""For a server whose requests were aborted to hold none."""
POLL_S = 0.1


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
    # Prompts that are computed come in SGLang's own chunks.
    server.chunk_tokens = 0 if args.prefill == REAL_PREFILL else 65_536
    return server


class BalanceProbe(threading.Thread):
    """Asks for the instances' KV tokens every second, until it is stopped: (seconds since its start, maximum over mean), where anybody
    holds any."""

    def __init__(self, server: GpuServer) -> None:
        super().__init__(daemon=True)
        self.server, self.stopped = server, threading.Event()
        self.samples: list[tuple[float, float]] = []

    def run(self) -> None:
        began = time.monotonic()
        while not self.stopped.wait(1.0):
            loads = self.server.client.json("GET", "/v1/loads")["loads"]
            tokens = [float(load["num_used_tokens"]) for load in loads]
            if sum(tokens):
                self.samples.append((time.monotonic() - began, max(tokens) / (sum(tokens) / len(tokens))))


def warm_up(server: GpuServer, contender: Contender, args: argparse.Namespace) -> None:
    """Some requests of this contender. RuntimeError where one fails: no point would be worth its time."""
    warm = DRY_WARM_UP if args.dry else WARM_UP
    done = asyncio.run(send_all(f"http://127.0.0.1:{server.port}", warm, seed=7, timeout_s=300, fields=contender.fields))
    if failed := [one.error for one in done if one.error is not None]:
        raise RuntimeError(f"warming up {contender.name}: {failed[0]}")


def measure(server: GpuServer, unit: Unit, args: argparse.Namespace) -> Point:
    """Arrivals, answers, balance, graphs. With --history-ms the window begins loaded and ends in time; the server is left empty."""
    mix_args = (unit.mix, unit.rate, args.seconds, unit.seed, args.longest, args.longest_output, args.history_ms)
    drawn, seconds = arrivals(*mix_args), args.seconds
    probe, logged = BalanceProbe(server), len(server.log())
    url, ends_s = f"http://127.0.0.1:{server.port}", seconds if args.history_ms else None
    probe.start()
    served = asyncio.run(send_all(url, drawn, seed=unit.seed, timeout_s=seconds * 2 + 60, fields=unit.contender.fields, ends_s=ends_s))
    probe.stopped.set()
    if args.history_ms:
        inside = [value for at_s, value in probe.samples if WARM_WINDOW_SHARE * seconds <= at_s <= seconds]
        found = window_point(served, unit.rate, inside, seconds) | {"history_ms": args.history_ms}
        found["empty_after_s"] = wait_empty(server)
    else:
        found = point(served, unit.rate, [value for _, value in probe.samples])
    found["graph_share"] = graph_share(server.log()[logged:])
    if args.prefill == REAL_PREFILL and not server.client.flush_cache():
        raise RuntimeError(f"{server.name} does not flush its cache: the next contender would find these prompts there")
    return found


def wait_empty(server: GpuServer, limit_s: float = EMPTY_LIMIT_S) -> float:
    """Waits until no instance runs a request or has one waiting, twice in a row: one may be between two queues. Returns the seconds that
    it took; RuntimeError beyond limit_s."""
    began, empty = time.monotonic(), 0
    while True:
        loads: list[dict[str, Any]] = server.client.json("GET", "/v1/loads")["loads"]
        held = [load["num_running_reqs"] + load["num_waiting_reqs"] for load in loads]
        empty = empty + 1 if not sum(held) else 0
        if empty == 2:
            return round(time.monotonic() - began, 3)
        if time.monotonic() - began > limit_s:
            raise RuntimeError(f"{server.name} still holds {held} requests {limit_s:g} s after they were aborted (EMPTY_LIMIT_S)")
        time.sleep(POLL_S)
