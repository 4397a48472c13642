"""What a decode step captured as a graph reads: which row is attended where, over which pages. Host side, numpy only.

A captured step cannot take a plan of its own shape (step_plan.py); it reads tables of fixed sizes, which one kernel of sgl-kernel-dcp
builds from the arrays made here. Pages of a request stay in a *line* of the device's page table from step to step; a step sends what
is new. The slots of an exchange follow from the routes alone, which every instance knows of every row.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from sglang_dcp.ledger.routes import shard_mask, travelling_tail
from sglang_dcp.ledger.steady import SteadyRows

TAIL_SHIFT = 16  # sgl_kernel_dcp.tables.ROUTE_TAIL_SHIFT; a test holds the two together
NO_SLOT = NO_PAGE = -1
FROM_TOKEN_TABLE = -2  # sgl_kernel_dcp.tables.FROM_TOKEN_TABLE, likewise

FIRST_TABLES_AHEAD, TABLES_AHEAD = 4, 32
"""Steps whose tables are made at once: when rows have just changed, and later."""
_AGES = np.arange(1, TABLES_AHEAD + 1, dtype=np.int32)[:, None, None]

HeldPages = Sequence[tuple[int, int]]
"""(sequence page index, page number) of one request on one shard, ascending."""


class ListedRow(NamedTuple):
    """A row whose pages here the host knows: a guest, or an own request with shards elsewhere.

    key: names the request for as long as it lives; a new one gets a new key. length: tokens of the sequence, the new one included.
    held: a live list, to which later pages are added. grows: the new token's K/V lies here; arrives: and came from its home.
    """

    key: Hashable
    length: int
    held: HeldPages
    grows: bool
    arrives: bool


class PooledRow(NamedTuple):
    """An own row with all its pages at home, listed in SGLang's token table (on the device). line: its row of that table."""

    key: Hashable
    line: int
    length: int


@dataclass(frozen=True)
class RowsInput:
    """This instance's attention rows in a step, and what is new in the page table.

    rows int32 [n, 4]: entry, tokens, new page, K/V slot of each attention row. The new page is that of the row's last token, by number,
    or FROM_TOKEN_TABLE - line where SGLang's token table (on the device) has it. writes int64 [2, w]: flat places of the page table and the
    pages to put there. copies int64 [2, c]: entries to fill from lines of the token table; copy_pages: how many pages of each, at most.
    """

    rows: np.ndarray
    writes: np.ndarray
    copies: np.ndarray
    copy_pages: int


def shard_tokens(held: HeldPages, length: int, page_size: int) -> int:
    """Tokens of the first `length` that lie on the pages `held`: all are full, but for the sequence's last."""
    last = (length - 1) // page_size
    count = bisect.bisect_left(held, (last + 1,))  # a pair is behind its first number alone
    cut = (last + 1) * page_size - length if count and held[count - 1][0] == last else 0
    return count * page_size - cut


def slot_of(held: HeldPages, position: int, page_size: int) -> int:
    """The token slot of a position that lies on one of the pages; NO_SLOT when it does not."""
    page_index, offset = divmod(position, page_size)
    place = bisect.bisect_left(held, (page_index,))
    return held[place][1] * page_size + offset if place < len(held) and held[place][0] == page_index else NO_SLOT


def route_word32(route: int) -> int:
    """A route as the kernels read it: a bit per shard, the travelling tail + 1 above."""
    return shard_mask(route) | travelling_tail(route) + 1 << TAIL_SHIFT


def route_words(routes: Iterable[int]) -> np.ndarray:
    """int32 words of a home as others see it: its sharded rows, in order.

    Rows that it attends alone, and where they lie in its batch, are nobody else's business: they change no slot of the exchange.
    """
    routes = list(routes)
    words = {route: route_word32(route) for route in set(routes)}
    return np.array([words[route] for route in routes], dtype=np.int32)


def guests_per_instance(routes: Sequence[Sequence[int]], groups: Sequence[range]) -> list[int]:
    """Rows that each instance attends for other homes; routes[h]: those of home h's sharded rows, by places in its group."""
    counts = [0] * len(routes)
    for group in groups:
        for place, home in enumerate(group):
            for route, rows in Counter(routes[home]).items():
                mask = shard_mask(route) & ~(1 << place)
                while mask:
                    low = mask & -mask
                    counts[group[low.bit_length() - 1]] += rows
                    mask ^= low
    return counts


@dataclass(slots=True)
class _Line:
    entry: int
    first_step: int
    is_pooled: bool
    num_pages: int = 0
    last_step: int = -1


@dataclass
class PageLines:
    """Which line of the device's page table belongs to which request, and how much of it is filled.

    num_entries lines of `width` pages. table_address: where `table` lies, contiguous, until the next call of `fill` or `advance`.
    Keys of pooled rows are forgotten when a step did not name them: their pages may have changed.
    They may change once while the row decodes, too: when SGLang has the result of its prefill, behind the row's first step, it can replace
    pages by others of the prefix cache with the same tokens. So a pooled row's line is filled in its first step and again in its second.
    """

    num_entries: int
    width: int
    page_size: int
    _lines: dict[Hashable, _Line] = field(default_factory=dict)
    _free: list[int] = field(default_factory=list)
    _step: int = -1
    _rows: Sequence[ListedRow | PooledRow] = ()
    _keys: set[Hashable] = field(default_factory=set)
    _block: np.ndarray = field(default_factory=lambda: np.zeros((1, 0, 4), dtype=np.int32))
    table_address: int = 0
    _table_bytes: int = 0
    _at: int = 0
    _cells: memoryview = field(default_factory=lambda: memoryview(b""))
    _growth: np.ndarray = field(default_factory=lambda: np.zeros((0, 4), dtype=np.int32))
    _steady: SteadyRows | None = None
    _tokens: list[int] = field(default_factory=list)
    _row_lines: list[_Line] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._free = list(range(self.num_entries - 1, -1, -1))

    def fill(self, step: int, rows: Sequence[ListedRow | PooledRow]) -> RowsInput:
        """`rows`: this instance's attention rows in their order: (home, position in that home's list), own rows last."""
        self._leave(rows, goes_on=step == self._step + 1)
        self._step, self._rows = step, rows
        self._lay(np.full((1, len(rows), 4), NO_SLOT, dtype=np.int32))
        table = self._block[0]
        places: list[int] = []
        pages: list[int] = []
        copies: list[tuple[int, int]] = []
        self._steady, copy_pages, page_size = None, 0, self.page_size
        counts: list[int] = []
        lines: list[_Line] = []
        known = self._lines
        for index, row in enumerate(rows):
            line = known.get(row.key) or self._new_line(row)
            if isinstance(row, PooledRow):
                tokens = row.length
                needed = -(-tokens // page_size)
                may_have_changed = line.first_step >= step - 1
                if needed > 1 and (may_have_changed or needed > line.num_pages + 1):
                    copies.append((line.entry, row.line))
                    copy_pages = max(copy_pages, needed)
                elif may_have_changed or needed == line.num_pages + 1:
                    self._append(index, needed)
            else:
                tokens = shard_tokens(row.held, row.length, page_size)
                needed = -(-tokens // page_size)
                if needed == line.num_pages + 1:
                    self._append(index, needed)
                elif needed > line.num_pages:
                    begin = line.entry * self.width
                    places += range(begin + line.num_pages, begin + needed)
                    pages += [number for _, number in row.held[line.num_pages : needed]]
                if row.arrives:
                    table[index, 3] = slot_of(row.held, row.length - 1, page_size)
            if needed > line.num_pages:
                line.num_pages = needed
            lines.append(line)
            counts.append(tokens)
        self._tokens, self._row_lines = counts, lines
        table[:, 0], table[:, 1] = [line.entry for line in lines], counts
        return RowsInput(table, _pairs([places, pages]), _pairs(list(zip(*copies, strict=True)) or [[], []]), copy_pages)

    def advance(self, step: int) -> list[int]:
        """The step after the last one, of the same rows: each has one token more, wherever its tail is. The input is `table` alone.

        Returns how many pages the rows have now that began one.
        """
        if step != self._step + 1:
            raise ValueError(f"step {step} does not follow step {self._step}")
        self._step = step
        steady = self._steady
        if steady is None:
            steady = self._begin_growth()
        steady.age += 1
        self._at += 1
        self.table_address += self._table_bytes
        if self._at == len(self._block):
            self._lay_ahead()
        begin = steady.beginning()
        return self._begin_pages(begin, steady.age) if begin else []

    def _begin_pages(self, begin: Sequence[int], age: int) -> list[int]:
        """The last token of these rows is the first of a page. Returns how many pages they have now."""
        begun, page_size = [], self.page_size
        for index in begin:
            row, needed = self._rows[index], (self._tokens[index] + age - 1) // page_size + 1
            begun.append(needed)
            self._append(index, needed)
            self._row_lines[index].num_pages = needed
            if isinstance(row, ListedRow) and row.arrives:
                slot, left = row.held[needed - 1][1] * page_size, len(self._block) - self._at
                self._block[self._at :, index, 3] = np.arange(slot, slot + left)
        return begun

    def _lay(self, block: np.ndarray) -> None:
        self._block, self._at = block, 0
        self._cells, self._table_bytes = block.reshape(-1).data, block.strides[0]
        self.table_address = block.__array_interface__["data"][0]

    def _lay_ahead(self) -> None:
        """The tables of the steps to come, if nobody joins or leaves, by one addition for all; new pages are put in where they begin.
        Few at first: rows that have changed lately change again."""
        last, steps = self._block[-1], TABLES_AHEAD if len(self._block) > 1 else FIRST_TABLES_AHEAD
        last[:, 2] = NO_PAGE
        block = self._growth * _AGES[:steps]
        block += last
        self._lay(block)

    def _begin_growth(self) -> SteadyRows:
        """What a step adds to the table, and which rows begin a page when. Made where a first step follows: many tables serve but one."""
        growing = [index for index, row in enumerate(self._rows) if isinstance(row, PooledRow) or row.grows]
        arriving = [index for index in growing if isinstance(row := self._rows[index], ListedRow) and row.arrives]
        self._growth = np.zeros_like(self.table)
        self._growth[growing, 1] = 1
        self._growth[arriving, 3] = 1
        self._steady = SteadyRows((), self._tokens, self.page_size, growing)
        return self._steady

    @property
    def table(self) -> np.ndarray:
        """`RowsInput.rows` of the last step."""
        return self._block[self._at]

    def _append(self, index: int, needed: int) -> None:
        """The row's last page, its `needed`-th here, is new in this step."""
        row = self._rows[index]
        if needed > self.width:
            raise ValueError(f"a row has {needed} pages here, a line of the page table holds {self.width} (--context-length)")
        page = FROM_TOKEN_TABLE - row.line if isinstance(row, PooledRow) else row.held[needed - 1][1]
        self._cells[4 * (self._at * len(self._rows) + index) + 2] = page

    def _leave(self, rows: Sequence[ListedRow | PooledRow], *, goes_on: bool) -> None:
        """Notes who is not among the next step's rows, and forgets the pooled ones of them; all of those where steps lie between."""
        before, self._keys = self._keys, {row.key for row in rows}
        for key in before - self._keys if goes_on else before:
            line = self._lines[key]
            if line.is_pooled:
                self._forget(key)
            else:
                line.last_step = self._step

    def _new_line(self, row: ListedRow | PooledRow) -> _Line:
        if not self._free:
            self._forget(min((key for key in self._lines if key not in self._keys), key=lambda key: self._lines[key].last_step))
        line = self._lines[row.key] = _Line(self._free.pop(), self._step, isinstance(row, PooledRow))
        return line

    def _forget(self, key: Hashable) -> None:
        self._free.append(self._lines.pop(key).entry)


def _pairs(columns: Sequence[Sequence[int]]) -> np.ndarray:
    return np.array(columns, dtype=np.int64).reshape(len(columns), -1)
