"""What a decode step captured as a graph reads: which row is attended where, over which pages. Host side, numpy only.

A captured step cannot take a plan of its own shape (step_plan.py); it reads tables of fixed sizes, which one kernel of sgl-kernel-dcp
builds from the arrays made here. Pages of a request stay in a *line* of the device's page table from step to step; a step sends what
is new. The slots of an exchange follow from the routes alone, which every instance knows of every row.
"""

from __future__ import annotations

import bisect
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from sglang_dcp.ledger.routes import shard_mask, travelling_tail

TAIL_SHIFT = 16  # sgl_kernel_dcp.tables.ROUTE_TAIL_SHIFT; a test holds the two together
NO_SLOT = -1

HeldPages = Sequence[tuple[int, int]]
"""(sequence page index, page number) of one request on one shard, ascending."""


@dataclass(frozen=True, slots=True)
class ListedRow:
    """A row whose pages here the host knows: a guest, or an own request that the ledger manages.

    key: names the request for as long as it lives; a new one gets a new key. route: as in ledger/routes.py. length: tokens of the
    sequence, the new one included.
    """

    key: Hashable
    route: int
    length: int
    held: HeldPages


@dataclass(frozen=True, slots=True)
class PooledRow:
    """An own row with all its pages at home, known to SGLang's token table (on the device) alone. line: its row of that table."""

    key: Hashable
    line: int
    length: int


@dataclass(frozen=True)
class StepTablesInput:
    """One instance's part of a step.

    words[h] int32: a word per row of home h (bit per shard, travelling tail + 1 above). rows int32 [n, 4]: entry, tokens, -1, K/V slot of
    each attention row. writes int64 [2, w]: flat places of the page table and the pages to put there. copies int64 [2, c]: entries to
    fill from lines of SGLang's token table; copy_pages: how many pages of each, at most.
    """

    words: list[np.ndarray]
    rows: np.ndarray
    writes: np.ndarray
    copies: np.ndarray
    copy_pages: int


def shard_tokens(held: HeldPages, length: int, page_size: int) -> int:
    """Tokens of the first `length` that lie on the pages `held`: all are full, but for the sequence's last."""
    last = (length - 1) // page_size
    count = bisect.bisect_right(held, last, key=_page_index)
    cut = (last + 1) * page_size - length if count and held[count - 1][0] == last else 0
    return count * page_size - cut


def slot_of(held: HeldPages, position: int, page_size: int) -> int:
    """The token slot of a position that lies on one of the pages; NO_SLOT when it does not."""
    page_index, offset = divmod(position, page_size)
    place = bisect.bisect_left(held, page_index, key=_page_index)
    return held[place][1] * page_size + offset if place < len(held) and held[place][0] == page_index else NO_SLOT


def _page_index(entry: tuple[int, int]) -> int:
    return entry[0]


def route_words(routes: Iterable[int], num_local: int, home: int) -> np.ndarray:
    """int32 words of a home as others see it: its sharded rows in order, then `num_local` rows that it attends alone.

    Where those lie in the batch is nobody else's business: it changes no slot of the exchange.
    """
    words = [shard_mask(route) | travelling_tail(route) + 1 << TAIL_SHIFT for route in routes]
    return np.array(words + [1 << home] * num_local, dtype=np.int32)


def guests_per_instance(routes: Sequence[Sequence[int]], num_instances: int) -> list[int]:
    """Rows that each instance attends for other homes; routes[h]: those of home h's sharded rows."""
    counts = [0] * num_instances
    for home, row_routes in enumerate(routes):
        for route in row_routes:
            mask = shard_mask(route) & ~(1 << home)
            while mask:
                low = mask & -mask
                counts[low.bit_length() - 1] += 1
                mask ^= low
    return counts


@dataclass
class _Line:
    entry: int
    num_pages: int = 0
    last_step: int = -1


@dataclass
class PageLines:
    """Which line of the device's page table belongs to which request, and how much of it is filled.

    num_entries lines of `width` pages. Keys of pooled rows are forgotten when a step did not name them: their pages may have changed.
    """

    num_entries: int
    width: int
    page_size: int
    _lines: dict[Hashable, _Line] = field(default_factory=dict)
    _pooled: set[Hashable] = field(default_factory=set)
    _free: list[int] = field(default_factory=list)
    _step: int = -1

    def __post_init__(self) -> None:
        self._free = list(range(self.num_entries - 1, -1, -1))

    def fill(self, step: int, words: list[np.ndarray], rows: Sequence[ListedRow | PooledRow], rank: int) -> StepTablesInput:
        """`rows`: this instance's attention rows in their order, (home, position in that home's list)."""
        if step != self._step + 1:
            self._forget(self._pooled)
        self._step = step
        lines = np.empty((len(rows), 4), dtype=np.int32)
        lines[:, 2] = -1
        places: list[int] = []
        pages: list[int] = []
        copies: list[tuple[int, int]] = []
        copy_pages = 0
        for index, row in enumerate(rows):
            line = self._line(row.key)
            if isinstance(row, PooledRow):
                tokens, slot, needed = row.length, NO_SLOT, -(-row.length // self.page_size)
                if needed > line.num_pages:
                    copies.append((line.entry, row.line))
                    copy_pages = max(copy_pages, needed)
            else:
                tokens = shard_tokens(row.held, row.length, self.page_size)
                needed = -(-tokens // self.page_size)
                slot = slot_of(row.held, row.length - 1, self.page_size) if travelling_tail(row.route) == rank else NO_SLOT
                begin = line.entry * self.width
                places += range(begin + line.num_pages, begin + needed)
                pages += [number for _, number in row.held[line.num_pages : needed]]
            line.num_pages = max(line.num_pages, needed)
            lines[index, 0], lines[index, 1], lines[index, 3] = line.entry, tokens, slot
        pooled = {row.key for row in rows if isinstance(row, PooledRow)}
        self._forget(self._pooled - pooled)
        self._pooled = pooled
        return StepTablesInput(
            words, lines, np.array([places, pages], dtype=np.int64), np.array(copies, dtype=np.int64).reshape(-1, 2).T, copy_pages
        )

    def _line(self, key: Hashable) -> _Line:
        line = self._lines.get(key)
        if line is None:
            if not self._free:
                self._forget([min(self._lines, key=lambda k: self._lines[k].last_step)])
            line = self._lines[key] = _Line(self._free.pop())
        line.last_step = self._step
        return line

    def _forget(self, keys: Iterable[Hashable]) -> None:
        for key in list(keys):
            line = self._lines.pop(key, None)
            self._pooled.discard(key)
            if line is not None:
                self._free.append(line.entry)
