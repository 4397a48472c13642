"""Stock SGLang against dynamic context parallelism on GPUs: step times in turns, host time, graphs and their memory, traces.

    python -m benchmark.gpu_runtime.run OUT_DIR [--one-gpu] [--model qwen3-30b-a3b] [--layers 24] [--rounds 5] [--limit 420]

Writes OUT_DIR/gpu_runtime.json after every part. The servers stand side by side on the same GPUs (two, or one for both instances) and are
measured in turns; an idle server launches nothing. Layers of a real model, few of them, random weights. Instances that share a GPU run in
turns, about 9 ms a layer on an H200: give two layers there.
"""

from __future__ import annotations

import argparse
import http.client
import json
import math
import platform
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmark.gpu_runtime.loads import Load, ratio_interval, run_load
from benchmark.gpu_runtime.traces import compare_graphs, profile, read_events, step_summary, wait_for_traces, waits_inside_replays
from benchmark.multi_gpu.model_shapes import model_flags, write_shape
from benchmark.multi_gpu.servers import GpuServer, stop_all, wait_ready
from benchmark.multi_gpu.settings import read_device_facts, set_environment
from benchmark.serving.provenance import provenance
from testing.gpu.servers import port_range
from testing.ports import find_free_port

INSTANCES, PAGE, CONTEXT, POOL = 2, 64, 131_072, 200_000
MAX_BATCH, REAL_LAYERS, PROFILED_STEPS = 192, 61, 8
HOST_LOAD = Load(home_rows=128, sharded=32, prompt=256, new_tokens=1100, prompt_spread=PAGE)
CHANGING_LOAD = replace(HOST_LOAD, spread=1000)
LOADS = {"s0": Load(32, 0, 1024, 320), "s16": Load(32, 16, 1024, 320), "s32": Load(32, 32, 1024, 320)}
"""By sharded rows of every instance: each of them is a guest row on the other one."""
TRACED_LOADS = {name: Load(32, load.sharded, 256, 1200) for name, load in LOADS.items()}
CAPTURE_END = re.compile(r"Capture target decode CUDA graph end\. bs=\[([\d, ]*)\], elapsed=([\d.]+) s, mem usage=([\d.]+) GB")
BUFFERS = re.compile(r"buffers of ([\d.]+) GiB")


FAILURES = (ArithmeticError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError, http.client.HTTPException)
"""A part that fails leaves the others their turn."""


class Bench:
    """The servers and what was found."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.end = args, time.monotonic() + args.limit
        self.started: list[GpuServer] = []
        path = write_shape(args.model, args.layers, args.out / "models")
        sizes = ("--context-length", str(CONTEXT), "--page-size", str(PAGE), "--chunked-prefill-size", str(8192 * INSTANCES))
        sizes += ("--load-format", "dummy", "--mem-fraction-static", "0.85", "--cuda-graph-max-bs-decode", str(MAX_BATCH))
        sizes += ("--max-running-requests", str(MAX_BATCH * INSTANCES), "--stream-interval", "8", *model_flags(args.model))
        sizes += ("--attention-backend", args.backend)
        stock = ("--attn-dp-size", str(INSTANCES), "--ep-size", str(INSTANCES))
        make = lambda name, dyncp, *flags: GpuServer(name, path, INSTANCES, POOL, dyncp, (*sizes, *flags), one_gpu=args.one_gpu)  # noqa: E731
        self.servers = {"stock": make("stock", False, *stock), "graph": make("graph", True)}
        if args.only_host:
            del self.servers["stock"]
        elif args.eager:
            self.servers["eager"] = make("eager", True, "--dyncp-transport", "nccl")
        self.found: dict[str, Any] = provenance(" ".join(["python", "-m", "benchmark.gpu_runtime.run", *sys.argv[1:]]))
        facts = read_device_facts()
        self.found["machine"] = f"{platform.machine()}, {1 if args.one_gpu else INSTANCES} x {facts['names'][0]}"
        self.found["commit"] = args.commit or self.found["commit"]
        self.found |= {"one_gpu": args.one_gpu, "model": args.model, "backend": args.backend, "layers": args.layers, "errors": {}}

    def save(self) -> None:
        (self.args.out / "gpu_runtime.json").write_text(json.dumps(self.found, indent=1))

    def part(self, name: str, work: Callable[[], Any], least_seconds: float = 15.0) -> None:
        began = time.monotonic()
        if began > self.end - least_seconds:
            self.found["errors"][name] = "no time left"
            return
        try:
            self.found[name] = work()
        except FAILURES:
            self.found["errors"][name] = traceback.format_exc()[-1500:]
        told = json.dumps(self.found.get(name, self.found["errors"].get(name)))
        print(name, round(time.monotonic() - began, 1), "s", told[:1500], flush=True)
        self.save()

    def run(self) -> None:
        for server in self.servers.values():  # one after the other: SGLang reads what its graphs take from the GPU's free memory
            server.start(self.args.out, find_free_port(*port_range(len(self.started))))
            self.started.append(server)
            wait_ready([server], self.end - 30)
        self.found["ready_s"] = {name: server.ready_s for name, server in self.servers.items()}
        late = [name for name, server in self.servers.items() if server.ready_s is None]
        if late:
            raise RuntimeError(f"servers not ready: {late}")
        if not self.args.only_host:
            self.part("graphs", self.graphs)
            self.part("step_ms", self.step_times)
            self.part("traces", self.traces)
        self.part("host", self.host)
        if not self.args.only_host:
            self.part("bars", self.bars, least_seconds=-math.inf)

    # ---- parts

    def graphs(self) -> dict[str, Any]:
        """Numbers and bytes of the captured graphs, as SGLang logs them."""
        rows = {}
        for name, server in self.servers.items():
            log = server.log()
            sizes, seconds, gib = CAPTURE_END.findall(log)[-1]
            variants = 3 if name == "graph" else 1
            rows[name] = {"num_graphs": len(sizes.split(",")) * variants, "capture_s": float(seconds), "gib": float(gib)}
            if name == "graph":
                rows[name]["buffers_gib"] = float(BUFFERS.findall(log)[-1])
        graph = rows["graph"]
        graph["graphs_gib"] = round(graph["gib"] - graph["buffers_gib"], 3)
        graph["mib_per_graph_and_layer"] = round(1024 * graph["graphs_gib"] / graph["num_graphs"] / self.args.layers, 4)
        graph["gib_61_layers"] = round(graph["graphs_gib"] / self.args.layers * REAL_LAYERS, 3)
        return rows

    def one(self, server: str, load: str, seed: int) -> float:
        return run_load(self.servers[server].client, LOADS[load], INSTANCES, seed, dyncp=server != "stock")["step_ms"]

    def step_times(self) -> dict[str, Any]:
        """Rounds over all servers and loads; the first is not counted."""
        cases = [("stock", "s0"), *[(name, load) for name in self.servers if name != "stock" for load in LOADS]]
        times: dict[str, list[float]] = {f"{name}_{load}": [] for name, load in cases}
        for number in range(self.args.rounds + 1):
            for name, load in cases:
                if time.monotonic() > self.end - 60:
                    break
                taken = self.one(name, load, number)
                if number:
                    times[f"{name}_{load}"].append(taken)
        full = min(len(values) for values in times.values())
        table = {}
        for case, values in times.items():
            ordered = sorted(values)
            table[case] = {"step_ms": values, "median_ms": ordered[len(ordered) // 2] if ordered else None}
            if case != "stock_s0" and full > 1:
                table[case] |= ratio_interval(values[:full], times["stock_s0"][:full])
        return table

    def traces(self) -> dict[str, Any]:
        """One trace per case, rank 0: kernels of a step, waits of the host."""
        rows: dict[str, Any] = {}
        for name, load in (("stock", "s0"), ("graph", "s0"), ("graph", "s16")):
            folder = self.args.out / f"trace_{name}_{load}"
            client = self.servers[name].client
            traced, dyncp = TRACED_LOADS[load], name != "stock"
            job = threading.Thread(target=run_load, args=(client, traced, INSTANCES, 77), kwargs={"dyncp": dyncp})
            job.start()
            time.sleep(3.0)
            profile(client, folder, PROFILED_STEPS)
            job.join()
            found = wait_for_traces(folder, INSTANCES, 25.0)
            if not found:
                rows[f"{name}_{load}"] = {"error": "no trace was written"}
                continue
            events = read_events(found[0])
            launches = sum(event.get("cat") == "cuda_runtime" and event["name"] == "cudaGraphLaunch" for event in events)
            rows[f"{name}_{load}"] = step_summary(events, max(1, launches)) | {"waits_inside_replays": waits_inside_replays(events)}
        stock, ours = rows["stock_s0"], rows["graph_s0"]
        if stock.get("graph") and ours.get("graph"):
            rows["s0_differences"] = compare_graphs(stock["graph"], ours["graph"])
        return rows

    def host(self) -> dict[str, Any]:
        """Microseconds of our code in a scheduler's step, 128 home rows and 32 guest rows per instance: while all decode on, and while
        requests of other lengths come and go. Steps of each kind so far are kept, so each load ends with more of them than are kept."""
        client = self.servers["graph"].client
        rows = {}
        for name, load in (("steady", HOST_LOAD), ("changing", CHANGING_LOAD)):
            window = run_load(client, load, INSTANCES, 5, dyncp=True)
            report = client.json("GET", "/dyncp/requests")
            rows[name] = {"load": vars(load), "step_ms": window["step_ms"], "instances": [row["host_us"] for row in report["instances"]]}
        return rows

    def bars(self) -> dict[str, Any]:
        """The keys that the project's bars name."""
        graphs, host = self.found["graphs"], self.found["host"]
        return {
            "s0_step_ratio": self.found["step_ms"]["graph_s0"].get("ratio"),
            "s0_same_kernels": not self.found["traces"].get("s0_differences", {"unknown": []}),
            "host_us_per_step": max(row["sharded"]["p50_us"] for row in host["steady"]["instances"]),
            "num_graphs": graphs["graph"]["num_graphs"],
            "stock_num_graphs": graphs["stock"]["num_graphs"],
            "graph_gib": graphs["graph"]["gib_61_layers"],
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--one-gpu", action="store_true", help="both instances on GPU 0: answers, graphs and host time, no step times")
    parser.add_argument("--model", default="qwen3-30b-a3b")
    parser.add_argument("--layers", type=int, default=24, help="enough that the GPU, not the host, sets the step")
    parser.add_argument("--backend", default="flashinfer", help="of both servers; fa3 is SGLang's own default on a Hopper GPU")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--limit", type=float, default=420.0, help="seconds for everything")
    parser.add_argument("--eager", action="store_true", help="a third server, whose sharded steps run without graphs (nccl)")
    parser.add_argument("--only-host", action="store_true", help="host time alone")
    parser.add_argument("--commit", help="what is measured, where git cannot tell")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    set_environment()
    bench = Bench(args)
    try:
        bench.run()
    except BaseException:
        bench.found["errors"]["run"] = traceback.format_exc()[-1500:]
        raise
    finally:
        stop_all(list(bench.servers.values()))
        bench.save()
    return 1 if bench.found["errors"] else 0


if __name__ == "__main__":
    sys.exit(main())
