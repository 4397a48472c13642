"""Into how many parts FlashAttention 3 may cut a decode row, and what it takes of a schedule (flash_schedule.py)."""

from __future__ import annotations

import torch

MOST_SPLITS = 128
"""What its merge of splits was run with here."""
FLASHES_OWN_SPLITS = 0
"""Its own number, which is of the block table's width: with it every row is cut alike, however long, and each cut costs."""
MOST_SCHEDULED = 992
"""Rows that the library schedules in one block; beyond, it splits none."""
MOST_GROUP = 64
"""Query heads per KV head that fit a tile of its queries, whatever the head dimension: a schedule has one tile per row."""


def most_splits(num_multiprocessors: int, kv_heads: int) -> int:
    """Parts that a row may be cut into, for a row alone to reach every multiprocessor. Where the number is named, the kernel cuts each row
    by its length, and does not cut short ones (measured: docs/results/kernels.md)."""
    return max(2, min(MOST_SPLITS, -(-num_multiprocessors // kv_heads)))


def splits_of(device: torch.device | str, kv_heads: int, *, own_split: bool) -> int:
    """The kernel's argument. own_split: as above, else FlashAttention's own."""
    if not own_split:
        return FLASHES_OWN_SPLITS
    return most_splits(torch.cuda.get_device_properties(device).multi_processor_count, kv_heads)


def has_one_tile(heads: int, kv_heads: int) -> bool:
    """Whether a schedule fits a decode of so many heads."""
    return heads <= MOST_GROUP * kv_heads


def has_causal_schedule(head_dim: int) -> bool:
    """Whether the kernel, called as causal, schedules one query token as such: for other heads it takes the call for one that is not."""
    return 64 < head_dim <= 128
