"""What a check on a GPU asks of a server, and how far two answers are from each other."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Any

from testing.client import Answer
from testing.gpu.runtime_cases import BOUNDS
from testing.gpu.servers import GpuServer


def prompt(length: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(256) for _ in range(length)]


def pinned(degree: int, home: int) -> dict[str, Any]:
    return {"custom_params": {"dyncp": {"degree": degree, "home": home}}, "ignore_eos": True}


def ask(server: GpuServer, ids: Sequence[int], new_tokens: int, pin: dict[str, Any] | None) -> Answer:
    sampling = pin or {"ignore_eos": True}
    return server.client.generate(ids, max_new_tokens=new_tokens, logprobs=True, sampling=sampling)


def differences(stock: Answer, ours: Answer, tie_gap: float = BOUNDS["tie_gap"]) -> dict[str, Any]:
    """Absolute differences of log-probability of all prompt tokens, and of output tokens up to the first that differs."""
    prompt_gaps = [abs(a.logprob - b.logprob) for a, b in zip(stock.prompt_tokens, ours.prompt_tokens, strict=True)]
    output_gaps, parted = [], None
    for place, (a, b) in enumerate(zip(stock.output_tokens, ours.output_tokens, strict=True)):
        if a.id != b.id:
            parted = {"place": place, "stock_gap": a.top_gap, "is_tie": a.top_gap is not None and a.top_gap < tie_gap}
            break
        output_gaps.append(abs(a.logprob - b.logprob))
    return {"prompt": prompt_gaps, "output": output_gaps, "parted": parted, "dyncp": ours.meta.get("dyncp")}


def summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    gaps = sorted(gap for result in results for part in ("prompt", "output") for gap in result[part])
    outputs = sorted(gap for result in results for gap in result["output"])

    def spread(values: list[float]) -> dict[str, float]:
        if not values:
            return {"count": 0, "mean": 0.0, "p99": 0.0, "max": 0.0}
        return {
            "count": len(values),
            "mean": sum(values) / len(values),
            "p99": values[min(len(values) - 1, int(0.99 * len(values)))],
            "max": values[-1],
        }

    parted = [result["parted"] for result in results if result["parted"]]
    return {
        "all": spread(gaps),
        "output": spread(outputs),
        "parted": parted,
        "parted_without_tie": sum(not entry["is_tie"] for entry in parted),
        "degrees": [(result["dyncp"] or {}).get("degree_end") for result in results],
    }


def step_counts(server: GpuServer) -> dict[str, float]:
    """Forward passes of all instances, as graphs and without."""
    text = server.client.metrics()
    counts = {}
    for kind in ("graph", "eager", "sharded_graph"):
        lines = re.findall(rf"^sglang:dyncp_{kind}_steps_total\{{.*?\}} (\S+)$", text, re.MULTILINE)
        counts[kind] = sum(float(value) for value in lines)
    return counts
