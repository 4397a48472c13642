"""What a profiled decode step launched: kernels by name, time by kind, and calls that wait for the device."""

from __future__ import annotations

import gzip
import json
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

OURS = ("dispatch_kernel", "return_merge_kernel", "step_tables_kernel")
ATTENTION = ("BatchPrefill", "BatchDecode", "BatchMLA", "PersistentVariableLengthMerge", "VariableLengthMerge", "flash_fwd", "MLAPaged")
WAITS = ("cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy")


def profile(client: Any, folder: Path, steps: int) -> None:
    """Has the server write a trace of `steps` steps per rank to `folder`; a load must be running."""
    folder.mkdir(parents=True, exist_ok=True)
    body = {"output_dir": str(folder), "num_steps": str(steps), "activities": ["CPU", "GPU"], "profile_by_stage": False}
    client.request("POST", "/start_profile", body)


def wait_for_traces(folder: Path, count: int, limit_s: float) -> list[Path]:
    """The traces by rank, complete; fewer when the limit has passed."""
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        found = sorted(folder.glob("*.trace.json.gz"))
        if len(found) >= count and all(_is_complete(path) for path in found):
            return found
        time.sleep(0.5)
    return [path for path in sorted(folder.glob("*.trace.json.gz")) if _is_complete(path)]


def _is_complete(path: Path) -> bool:
    try:
        read_events(path)
    except (OSError, EOFError, ValueError):
        return False
    return True


def read_events(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt") as stream:
        return list(json.load(stream)["traceEvents"])


def step_summary(events: Iterable[dict[str, Any]], steps: int) -> dict[str, Any]:
    """Per step: kernels (count, microseconds by kind) and waiting calls of the host. graph: the kernels of a replay."""
    events = list(events)
    kernels = [event for event in events if event.get("cat") == "kernel"]
    kinds: Counter[str] = Counter()
    for kernel in kernels:
        kinds[_kind(kernel["name"])] += kernel["dur"]
    calls = Counter(event["name"] for event in events if event.get("cat") == "cuda_runtime")
    return {
        "graph_launches": calls["cudaGraphLaunch"] / steps,
        "kernels": len(kernels) / steps,
        "us": {kind: round(total / steps, 2) for kind, total in kinds.items()},
        "host_waits": {name: calls[name] / steps for name in WAITS if calls[name]},
        "graph": _graph_kernels(events, kernels),
    }


def _graph_kernels(events: list[dict[str, Any]], kernels: list[dict[str, Any]]) -> dict[str, float]:
    """Kernels of a replayed graph by name, per replay."""
    launches = {e["args"]["correlation"] for e in events if e.get("cat") == "cuda_runtime" and e["name"] == "cudaGraphLaunch"}
    replayed = [kernel for kernel in kernels if kernel["args"].get("correlation") in launches]
    seen = len({kernel["args"]["correlation"] for kernel in replayed})
    return {name: round(count / seen, 3) for name, count in sorted(Counter(kernel["name"] for kernel in replayed).items())}


def waits_inside_replays(events: Iterable[dict[str, Any]]) -> int:
    """Waiting calls of the host that began while a graph was being launched, on the same thread."""
    runtime = [event for event in events if event.get("cat") == "cuda_runtime"]
    launches = [(e["tid"], e["ts"], e["ts"] + e["dur"]) for e in runtime if e["name"] == "cudaGraphLaunch"]
    waits = [(e["tid"], e["ts"]) for e in runtime if e["name"] in WAITS]
    return sum(any(tid == thread and begin <= moment <= end for thread, begin, end in launches) for tid, moment in waits)


def _kind(name: str) -> str:
    if any(part in name for part in OURS):
        return "ours"
    return "attention" if any(part in name for part in ATTENTION) else "rest"


def compare_graphs(stock: dict[str, float], ours: dict[str, float]) -> dict[str, list[float]]:
    """Kernels whose number per replay differs: name -> [stock, ours]. Empty when the two graphs are the same."""
    both = sorted(set(stock) | set(ours))
    return {name: [stock.get(name, 0.0), ours.get(name, 0.0)] for name in both if stock.get(name) != ours.get(name)}
