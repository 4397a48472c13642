"""What dataflow/attention/flash_schedule.py computes on the device, in plain Python: parts handed out one by one with a heap.

    TRITON_INTERPRET=1 python -m testing.kernels.flash_schedule < CASES.json

prints what the device code itself makes of the cases, in Triton's interpreter: [[lengths, causal], ...] gives [metadata, ...], for SMALL.
In a process of its own, because Triton's library (sorting) is interpreted only where the variable was there when it was imported.
"""

from __future__ import annotations

import heapq
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

CUTS, PART_ROUNDS, FINEST = 16, 2, 10


@dataclass(frozen=True)
class Sizes:
    """Of a schedule: as FlashSchedule's arguments."""

    kv_heads: int
    multiprocessors: int
    most_parts: int
    block_tokens: int = 128


SMALL = Sizes(kv_heads=2, multiprocessors=6, most_parts=3)
"""Small enough for the interpreter."""


def parts_of_cut(lengths: Sequence[int], cut: int, sizes: Sizes) -> list[tuple[int, int]]:
    """(parts, cost of each) per row."""
    rounds = [math.ceil(length / sizes.block_tokens) for length in lengths]
    share = np.float32(sum(rounds) * sizes.kv_heads) / np.float32(sizes.multiprocessors)
    target = int(share * np.float32(1.1) * np.exp2(np.float32(-cut / 4))) + 1
    counts = [min(max(math.ceil(number / target), 1), sizes.most_parts) for number in rounds]
    return [(count, math.ceil(number / count) + PART_ROUNDS) for number, count in zip(rounds, counts, strict=True)]


def price(parts: Sequence[tuple[int, int]], sizes: Sizes, finest: int = FINEST) -> int:
    """Cost of a cut: longest parts first, each to the multiprocessor that is free first."""
    work = sum(count * cost for count, cost in parts) * sizes.kv_heads
    loads = [0] * sizes.multiprocessors
    for count, cost in sorted(parts, key=lambda part: -part[1]):
        if cost * sizes.multiprocessors * finest >= work:
            for _ in range(count * sizes.kv_heads):
                heapq.heapreplace(loads, loads[0] + cost)
    return max(max(loads) * sizes.multiprocessors, work) * 2 + sum(count for count, _ in parts) * sizes.kv_heads


def parts_of_rows(lengths: Sequence[int], sizes: Sizes) -> list[tuple[int, int]]:
    """(parts, cost of each) per row, by the cheapest cut."""
    cuts = [parts_of_cut(lengths, cut, sizes) for cut in range(CUTS)]
    return min(cuts, key=lambda parts: price(parts, sizes))


def read_schedule(metadata: Sequence[int], num_rows: int, kv_heads: int, *, causal: bool) -> tuple[list[int], list[int]]:
    """Parts per row, and the rows in the order in which they are handed out. Raises AssertionError for what the library cannot take."""
    rounded, vectors = -(-num_rows // 4) * 4, 4 if causal else 3
    assert len(metadata) == vectors * rounded + 1 and metadata[-1] == 0
    parts, tiles, rows, *heads = (list(metadata[begin : begin + num_rows]) for begin in range(0, vectors * rounded, rounded))
    assert tiles == [1] * num_rows and sorted(rows) == list(range(num_rows)) and heads == [[kv_heads] * num_rows] * causal
    of_row = dict(zip(rows, parts, strict=True))
    return [of_row[row] for row in range(num_rows)], rows


def interpreted(cases: Sequence[tuple[list[int], bool]]) -> list[list[int]]:
    """The device code's metadata of every (lengths, causal)."""
    command = [sys.executable, "-m", "testing.kernels.flash_schedule"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    ended = subprocess.run(command, input=json.dumps(cases), env=environment, capture_output=True, text=True, timeout=300, check=False)
    if ended.returncode != 0:
        raise RuntimeError(f"Triton's interpreter ended with {ended.returncode}: {ended.stderr[-2000:]}")
    return json.loads(ended.stdout)


def main() -> None:
    import torch

    from sglang_dcp.dataflow.attention.flash_schedule import FlashSchedule

    found = []
    for lengths, causal in json.load(sys.stdin):
        given = {"multiprocessors": SMALL.multiprocessors, "block_tokens": SMALL.block_tokens, "causal": causal}
        schedule = FlashSchedule(len(lengths), SMALL.kv_heads, SMALL.most_parts, "cpu", **given)
        schedule.metadata.fill_(77)  # what a step before left
        schedule.plan(torch.tensor(lengths, dtype=torch.int32))
        # Behind the last row of each vector nobody reads, nor writes.
        found.append(schedule.metadata.tolist())
    print(json.dumps(found))


if __name__ == "__main__":
    main()
