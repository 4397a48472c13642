"""Tables of a step and of those behind it, if nobody joins or leaves: made at once, by one addition for all."""

from __future__ import annotations

import numpy as np

from sglang_dcp.dataflow.graph.table_rows import ARRIVES, GROWS, POOLED

NO_SLOT = NO_PAGE = -1

FIRST_TABLES_AHEAD, TABLES_AHEAD = 4, 32
"""Steps whose tables are made at once: when rows have just changed, and later."""
GROWTH = np.zeros((4, 4), dtype=np.int32)
"""By a row's kind (table_rows.py): what a step adds to its row of the table."""
GROWTH[[GROWS, ARRIVES, POOLED], 1] = 1
GROWTH[ARRIVES, 3] = 1
_AGES = np.arange(1, TABLES_AHEAD + 1, dtype=np.int32)[:, None, None]


class TablesAhead:
    """Of a step's table, int32 [rows, 4] as in RowsInput. address: where it lies, contiguous, until the next call."""

    growth: np.ndarray
    _block: np.ndarray
    _cells: np.ndarray | memoryview
    __slots__ = ("_address", "_at", "_block", "_cells", "growth")

    def __init__(self) -> None:
        self.begin(np.zeros((1, 0, 4), dtype=np.int32), np.zeros((0, 4), dtype=np.int32))

    @property
    def table(self) -> np.ndarray:
        return self._block[self._at]

    @property
    def address(self) -> int:
        return self._address or int(self._block.__array_interface__["data"][0])

    def begin(self, block: np.ndarray, growth: np.ndarray) -> None:
        """block [1, rows, 4]: the step's table. growth [rows, 4]: what every step behind adds to it. They may still be written to."""
        self.growth, self._block, self._cells, self._at = growth, block, block, 0
        self._address = 0  # nobody may ask: the first table is sent with a message

    def advance(self) -> int:
        """On to the table of the step behind the last one. Returns its address."""
        self._at += 1
        if self._at == len(self._block):
            self._lay_ahead()
        else:
            self._address += 16 * len(self.growth)
        return self._address

    def put_page(self, index: int, page: int) -> None:
        """The row's new page, in this step's table alone."""
        self._cells[self._at, index, 2] = page

    def put_slot(self, index: int, slot: int) -> None:
        """The row's K/V slot, in this step's table and with those that follow it in the ones ahead."""
        left = len(self._block) - self._at
        self._block[self._at :, index, 3] = np.arange(slot, slot + left)

    def _lay_ahead(self) -> None:
        """New pages are put in where they begin. Few tables at first: rows that have changed lately change again."""
        last, steps = self._block[-1], TABLES_AHEAD if len(self._block) > 1 else FIRST_TABLES_AHEAD
        last[:, 2] = NO_PAGE
        block = self.growth * _AGES[:steps]
        block += last
        self._block, self._cells, self._at = block, block.data, 0
        self._address = int(block.__array_interface__["data"][0])
