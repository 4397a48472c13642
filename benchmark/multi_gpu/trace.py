"""Lengths of the Mooncake trace's first requests, for the parts that serve many."""

from __future__ import annotations

import csv

from benchmark.multi_gpu.settings import ROOT

TRACE = ROOT / "test" / "data" / "mooncake_lengths.csv"


def trace_lengths(count: int, longest: int) -> list[tuple[int, int]]:
    """(prompt, output) of the trace's first requests, scaled down only where the longest would not fit."""
    with TRACE.open() as lines:
        rows = list(csv.DictReader(line for line in lines if not line.startswith("#")))
    lengths = [(int(row["input_length"]), int(row["output_length"])) for row in rows]
    factor = min(1.0, longest / max(prompt for prompt, _ in lengths))
    return [(max(4, round(prompt * factor)), max(2, round(output * factor))) for prompt, output in lengths[:count]]
