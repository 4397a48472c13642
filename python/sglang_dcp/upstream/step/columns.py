"""SGLang's row of a step with our control columns behind it (ledger/columns.py)."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch

from sglang_dcp.ledger.columns import NUM_COLUMNS


class SyncRow:
    """The widened row, in one tensor for all steps: the exchange has ended before the next one.

    Its width, element type and device are those of the first step; RuntimeError for a row of another width.
    """

    def __init__(self) -> None:
        self._row: torch.Tensor | None = None
        self._width = 0
        self._words: memoryview | None = None
        self._missing: torch.Tensor | None = None

    def widen(self, row: torch.Tensor, columns: Sequence[int]) -> torch.Tensor:
        """row: SGLang's, [width] of integers. columns: ours. Returns [width + NUM_COLUMNS], valid until the next call."""
        if self._row is None:
            self._row = row.new_zeros(len(row) + NUM_COLUMNS)
            self._width = len(row)
            if row.device.type == "cpu" and row.dtype == torch.int64:
                self._words, self._pack = self._row.numpy().data.cast("B"), struct.Struct(f"{len(self._row)}q").pack_into
        if self._words is None:
            return torch.cat([row, row.new_tensor(columns)])
        # As numbers: an operation of torch on so few of them costs the host several times as much.
        stock = row.tolist()
        if len(stock) != self._width:
            raise RuntimeError(f"SGLang's row of this step has {len(stock)} columns, that of the first one had {self._width}")
        self._pack(self._words, 0, *stock, *columns)
        return self._row

    def of_missing_rank(self, row: torch.Tensor) -> torch.Tensor:
        """The row of a rank that is gone, with zeros of ours. SGLang makes it in every step, of constants alone; if another release does
        not, check_upstream.py tells."""
        if self._missing is None:
            self._missing = torch.nn.functional.pad(row, (0, NUM_COLUMNS))
        return self._missing
