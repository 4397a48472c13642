"""The light report: loads of the instances, degrees, and the longest requests. `sglang-dcp top` and the live page read it every second."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

MOST_REQUESTS = 20
"""Requests that a load shows: the longest ones."""


def merge_loads(loads: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """{"instances": [...], "degrees": {degree: requests that hold KV}, "longest": [...]} of all instances' loads."""
    loads = sorted(loads, key=lambda load: load["rank"])
    degrees: Counter[int] = Counter()
    for load in loads:
        degrees.update({int(degree): number for degree, number in load["degrees"].items()})
    figures = [{name: value for name, value in load.items() if name not in ("degrees", "longest")} for load in loads]
    return {
        "instances": figures,
        "degrees": {str(degree): degrees[degree] for degree in sorted(degrees)},
        "longest": heapq.nlargest(MOST_REQUESTS, (entry for load in loads for entry in load["longest"]), key=_length),
    }


def _length(entry: Mapping[str, Any]) -> int:
    return int(entry["prompt_tokens"]) + int(entry["output_tokens"])
