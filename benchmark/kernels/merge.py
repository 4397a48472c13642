"""Merge of stacked partial results."""

from __future__ import annotations

from collections.abc import Callable

import torch
from sgl_kernel_dcp import merge_stacked

from benchmark.kernels.timing import Row
from sglang_dcp.dataflow.measure.timing import graph_microseconds

NUM_SETS = 4  # together larger than the L2, so that every read comes from memory


def stacked(partials: int, rows: int, heads: int, dim: int) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    return [
        (
            torch.randn(partials, rows, heads, dim, device="cuda").to(torch.bfloat16),
            torch.randn(partials, rows, heads, device="cuda"),
            torch.zeros(rows, heads, dim, dtype=torch.bfloat16, device="cuda"),
        )
        for _ in range(NUM_SETS)
    ]


def measure_one(partials: int, rows: int, heads: int, dim: int) -> Row:
    sets = stacked(partials, rows, heads, dim)
    actions: list[Callable[[], None]] = [lambda s=s: merge_stacked(*s) for s in sets]
    moved = rows * heads * ((partials + 1) * dim * 2 + partials * 4)
    return Row(f"merge {rows} rows x {partials} partials x {heads} x {dim}", graph_microseconds(actions), moved)


def flashinfer_merge(partials: int, rows: int, heads: int, dim: int) -> Row:
    """FlashInfer wants [rows, partials, heads, dim], returns the LSE as well, and launches no more than 64 heads of 128 or 16 of 512."""
    import flashinfer

    sets = [(o.transpose(0, 1).contiguous(), lse.transpose(0, 1).contiguous()) for o, lse, _ in stacked(partials, rows, heads, dim)]
    actions: list[Callable[[], None]] = [lambda s=s: flashinfer.merge_states(*s) for s in sets]
    moved = rows * heads * ((partials + 1) * dim * 2 + (partials + 1) * 4)
    return Row(f"flashinfer.merge_states {rows} x {partials} x {heads} x {dim}", graph_microseconds(actions), moved)


def measure(bandwidth: float, *, with_flashinfer: bool) -> tuple[list[Row], dict[str, float]]:
    rows = [measure_one(8, 64, 128, 512), measure_one(4, 64, 128, 512), measure_one(16, 64, 128, 512), measure_one(8, 512, 64, 128)]
    keys = {"merge_copy_share": rows[0].share(bandwidth), "merge_us": rows[0].microseconds}
    if with_flashinfer:
        rows.append(flashinfer_merge(8, 512, 64, 128))
        keys["merge_over_flashinfer_at_128"] = rows[-1].microseconds / rows[-2].microseconds
    return rows, keys
