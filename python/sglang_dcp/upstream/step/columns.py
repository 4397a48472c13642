"""Control columns that ride on SGLang's per-step all-gather, appended to its own."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch

NUM_COLUMNS = 8
WORDS, DECISIONS, ROWS_CHECKSUM, FREE_PAGES, GUEST_PAGES, KV_TOKENS, HOME_REQUESTS, STEP = range(NUM_COLUMNS)
"""DECISIONS: digest of what the ledger has decided up to the step before, the same on all instances."""


class WidenedRow:
    """SGLang's row of a step with our columns behind it, in one tensor for all steps: the exchange has ended before the next one.

    Its width, element type and device are those of the first step; torch refuses a row of another width.
    """

    def __init__(self) -> None:
        self._row: torch.Tensor | None = None
        self._head: torch.Tensor | None = None
        self._tail: memoryview | None = None

    def widen(self, row: torch.Tensor, columns: Sequence[int]) -> torch.Tensor:
        """row: SGLang's, [width] of integers. columns: ours. Returns [width + NUM_COLUMNS], valid until the next call."""
        if self._row is None:
            self._row = row.new_zeros(len(row) + NUM_COLUMNS)
            self._head = self._row[: len(row)]
            if row.device.type == "cpu" and row.dtype == torch.int64:
                self._tail = self._row[len(row) :].numpy().data.cast("B")
        if self._tail is None:
            return torch.cat([row, row.new_tensor(columns)])
        assert self._head is not None
        self._head.copy_(row)
        _COLUMNS.pack_into(self._tail, 0, *columns)
        return self._row


_COLUMNS = struct.Struct(f"{NUM_COLUMNS}q")
