"""Control columns that ride on SGLang's per-step all-gather, appended to its own."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch

NUM_COLUMNS = 8
WORDS, NUM_ROWS, ROWS_CHECKSUM, FREE_PAGES, GUEST_PAGES, KV_TOKENS, HOME_REQUESTS, STEP = range(NUM_COLUMNS)


class WidenedRow:
    """SGLang's row of a step with our columns behind it, in one tensor for all steps: the exchange has ended before the next one."""

    def __init__(self) -> None:
        self._row = torch.zeros(NUM_COLUMNS, dtype=torch.int64)
        self._lay_out()

    def widen(self, row: torch.Tensor, columns: Sequence[int]) -> torch.Tensor:
        """row: SGLang's, [width] of integers. columns: ours. Returns [width + NUM_COLUMNS], valid until the next call."""
        if row.device.type != "cpu" or row.dtype != torch.int64:
            return torch.cat([row, torch.tensor(columns, dtype=row.dtype, device=row.device)])
        if row.numel() != self._stock.numel():
            self._row = row.new_zeros(row.numel() + NUM_COLUMNS)
            self._lay_out()
        self._stock.copy_(row)
        _COLUMNS.pack_into(self._own, 0, *columns)
        return self._row

    def _lay_out(self) -> None:
        self._stock = self._row[:-NUM_COLUMNS]
        self._own = self._row[-NUM_COLUMNS:].numpy().data.cast("B")


_COLUMNS = struct.Struct(f"{NUM_COLUMNS}q")
