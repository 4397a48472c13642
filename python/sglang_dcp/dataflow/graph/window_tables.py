"""What the window layers of a captured decode step read: the last few tokens of every attention row, by token slot.

Window K/V lie in the pages that the step's tables list already, in order of position, and of a row's keys here those that its query sees
are the last ones. So a window layer's table follows from the step's on the device, given how many these are. Of a row whose pages are all
at home that is the window; of a row with shards the host says it, because only it knows where the other keys lie.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from sglang_dcp.dataflow.device_plan import to_device
from sglang_dcp.dataflow.graph.static_tables import shard_tokens
from sglang_dcp.dataflow.graph.table_rows import ListedRow, PooledRow


class WindowCaps:
    """How many of its last keys here each attention row may read at most, from step to step. Host side.

    Most rows settle: all that they see lies here and grows here, or nothing does. The others change with every token.
    """

    def __init__(self, window: int, page_size: int, num_rows: int) -> None:
        self.window, self.page_size = window, page_size
        self.caps = np.full(num_rows, window + 1, dtype=np.int32)
        self._moving: list[tuple[int, ListedRow]] = []
        self._age = 0

    def fill(self, rows: Sequence[ListedRow | PooledRow]) -> None:
        """The attention rows of a step, in their order."""
        self._age = 0
        self.caps.fill(self.window + 1)
        self._moving = self._count([(index, row) for index, row in enumerate(rows) if isinstance(row, ListedRow)])

    def advance(self) -> bool:
        """The same rows, one token on. Returns whether `caps` changed."""
        self._age += 1
        if not self._moving:
            return False
        self._moving = self._count(self._moving)
        return True

    def _count(self, rows: Sequence[tuple[int, ListedRow]]) -> list[tuple[int, ListedRow]]:
        """Writes the rows' caps; returns those that the next token changes."""
        moving = []
        for index, row in rows:
            length = row.length + self._age
            unseen = length - 1 - self.window
            count = shard_tokens(row.held, length, self.page_size)
            if unseen > 0:
                count -= shard_tokens(row.held, unseen, self.page_size)
            self.caps[index] = count
            stays = count == self.window + 1 if row.grows else count == 0
            if unseen <= 0 or not stays:
                moving.append((index, row))
        return moving


class WindowTables:
    """The table of one window: slots int32 [S, window + 1], of which a row's first `length` [S] are read. block_table [S, width] and
    kv_length [S]: the step's, int32 on the device. `build` may be captured."""

    def __init__(self, window: int, page_size: int, block_table: torch.Tensor, kv_length: torch.Tensor) -> None:
        rows, device = len(kv_length), kv_length.device
        self.caps = WindowCaps(window, page_size, rows)
        self.slots = torch.zeros(rows, window + 1, dtype=torch.int32, device=device)
        self.length = torch.zeros(rows, dtype=torch.int32, device=device)
        self._caps = torch.full((rows,), window + 1, dtype=torch.int32, device=device)
        self._places = torch.arange(window + 1, dtype=torch.int32, device=device)
        self._block_table, self._kv_length, self._page_size = block_table, kv_length, page_size

    def fill(self, rows: Sequence[ListedRow | PooledRow]) -> None:
        self.caps.fill(rows)
        self._send()

    def advance(self) -> None:
        if self.caps.advance():
            self._send()

    def build(self, num_rows: int) -> None:
        """Behind the step's own tables: of their first num_rows rows."""
        lengths = self._kv_length[:num_rows]
        seen = torch.minimum(lengths, self._caps[:num_rows], out=self.length[:num_rows])
        places = (lengths - seen).unsqueeze(1) + self._places
        # Those behind a row's end are read by nobody; they shall lie in the table.
        pages = (places // self._page_size).clamp_(max=self._block_table.shape[1] - 1)
        numbers = self._block_table[:num_rows].gather(1, pages.long())
        torch.add(places % self._page_size, numbers, alpha=self._page_size, out=self.slots[:num_rows])

    def _send(self) -> None:
        self._caps.copy_(to_device(torch.from_numpy(self.caps.caps.copy()), self._caps.device))
