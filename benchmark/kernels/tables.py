"""The step's table kernel."""

from __future__ import annotations

import random

import torch
from sgl_kernel_dcp import RowLine, StepMessage, StepTables, TableShape

from benchmark.kernels.timing import Row
from sglang_dcp.dataflow.measure.timing import graph_microseconds

NUM_INSTANCES = 8
NUM_ATTENTION_ROWS = 256
PAGE_SIZE = 64


def message(tokens: int) -> StepMessage:
    """Eight homes; instance 0 attends exactly 256 rows of `tokens` tokens, an eighth of them with K/V that travel to it."""
    rng = random.Random(0)
    routes, tails, rows = [], [], []
    for home in range(NUM_INSTANCES):
        home_routes, home_tails = [], []
        for position in range(NUM_ATTENTION_ROWS // NUM_INSTANCES * 2):
            others = rng.sample(range(1, NUM_INSTANCES), rng.choice([1, 1, 3]))
            here = position % 2 == 0
            home_routes.append(sorted([0, *others]) if here else sorted(others))
            travels = here and home != 0 and position % 16 == 0
            home_tails.append(0 if travels else -1)
            if here:
                entry = len(rows)
                rows.append(RowLine(entry, tokens, entry if entry % 4 == 0 else -1, entry if travels else -1))
        routes.append(home_routes)
        tails.append(home_tails)
    return StepMessage(routes, tails, rows)


def measure() -> tuple[list[Row], dict[str, float]]:
    rows = []
    for tokens in (4096, 32768):
        pages = tokens // PAGE_SIZE
        shape = TableShape(NUM_INSTANCES, 256, NUM_ATTENTION_ROWS, 64, NUM_ATTENTION_ROWS * pages, pages, PAGE_SIZE)
        tables = StepTables(shape, 0, NUM_ATTENTION_ROWS, "cuda:0", 1024)
        tables.resident_pages.copy_(torch.arange(tables.resident_pages.numel(), device="cuda").view_as(tables.resident_pages))
        tables.upload(message(tokens))
        microseconds = graph_microseconds([tables.build])
        rows.append(Row(f"tables, 256 rows x {tokens} tokens", microseconds, note=f"{256 * pages} pages, 8 instances"))
    return rows, {"tables_us": rows[0].microseconds}
