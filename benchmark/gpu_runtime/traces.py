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
    """Per step: kernels (count, microseconds by kind) and waiting calls of the host. names: how often each kernel ran in all steps."""
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
        "names": dict(sorted(Counter(kernel["name"] for kernel in kernels).items())),
    }


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


def compare_names(stock: dict[str, int], ours: dict[str, int], stock_steps: float, our_steps: float) -> dict[str, list[float]]:
    """Kernels whose number per graph launch differs: name -> [stock, ours]. Empty when the two graphs are the same."""
    both = sorted(set(stock) | set(ours))
    per_step = {name: [round(stock.get(name, 0) / stock_steps, 3), round(ours.get(name, 0) / our_steps, 3)] for name in both}
    return {name: counts for name, counts in per_step.items() if counts[0] != counts[1]}
