"""What a decode step captured as a graph reads: which row is attended where, over which pages. Host side, numpy only.

A captured step cannot take a plan of its own shape (step_plan.py); it reads tables of fixed sizes, which one kernel of sgl-kernel-dcp
builds from the arrays made here. Pages of a request stay in a *line* of the device's page table from step to step; a step sends what
is new. Rows that stay are moved as a whole: one by one are looked at those that joined, or begin a page.
"""

from __future__ import annotations

import bisect
from array import array
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sglang_dcp.dataflow.graph.table_rows import ARRIVES, POOLED, HeldPages, ListedRow, PooledRow, TableRows
from sglang_dcp.dataflow.graph.tables_ahead import GROWTH, NO_PAGE, NO_SLOT, TablesAhead
from sglang_dcp.ledger.kept_runs import Run, joined, left
from sglang_dcp.ledger.steady import SteadyRows

_FEW = 16  # rows that are put into a table one by one: below that numpy's indexing by lists costs more
FROM_TOKEN_TABLE = -2  # sgl_kernel_dcp.tables.FROM_TOKEN_TABLE; a test holds the two together


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


@dataclass(slots=True)
class _Line:
    entry: int
    first_step: int
    is_pooled: bool
    num_pages: int = 0


@dataclass(slots=True)
class _News:
    """What a step changes in the page table: places and pages to write, (entry, line of the token table) to copy."""

    places: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    copy_pages: int = 0

    def input(self, table: np.ndarray) -> RowsInput:
        copies = np.ascontiguousarray(np.array(self.copies, dtype=np.int64).reshape(-1, 2).T)
        return RowsInput(table, np.array([self.places, self.pages], dtype=np.int64), copies, self.copy_pages)


@dataclass
class PageLines:
    """Which line of the device's page table belongs to which request, and how much of it is filled.

    num_entries lines of `width` pages. table_address: where `table` lies, contiguous, until the next call of `fill` or `advance`.
    Keys of pooled rows are forgotten when a step did not name them: their pages may have changed.
    They may change once while the row decodes, too: when SGLang has the result of its prefill, behind the row's first step, it can replace
    pages by others of the prefix cache with the same tokens. So a pooled row's line is filled in its first step and again in its second;
    where that one is an `advance`, `renewal` says so, and is None otherwise.
    """

    num_entries: int
    width: int
    page_size: int
    table_address: int = 0
    renewal: RowsInput | None = None
    _lines: dict[Hashable, _Line] = field(default_factory=dict)
    _idle: dict[Hashable, None] = field(default_factory=dict)  # listed rows that no step names now; who left first is first
    _free: list[int] = field(default_factory=list)
    _step: int = -1
    _rows: TableRows = field(default_factory=TableRows)  # as they were filled in last, with their tokens here and their lines
    _tokens: list[int] = field(default_factory=list)
    _row_lines: list[_Line] = field(default_factory=list)
    _fresh: list[int] = field(default_factory=list)  # places of the pooled ones that no step had named before
    _steady: SteadyRows = field(default_factory=lambda: SteadyRows((), ()))
    _ahead: TablesAhead = field(default_factory=TablesAhead)

    def __post_init__(self) -> None:
        self._free = list(range(self.num_entries - 1, -1, -1))

    @property
    def table(self) -> np.ndarray:
        """`RowsInput.rows` of the last step."""
        return self._ahead.table

    def fill(self, step: int, rows: Sequence[ListedRow | PooledRow]) -> RowsInput:
        """`rows`: this instance's attention rows in their order: (home, position in that home's list), own rows last."""
        rows, goes_on = TableRows.of(step, rows), step == self._step + 1
        runs = rows.runs if goes_on and rows.came_from is self._rows.name else []
        others = joined(runs, len(rows))
        self._leave({rows.keys[index] for index in others}, left(runs, len(self._rows)), goes_on=goes_on)
        self._ahead.advance()
        last, last_lines = self.table, self._row_lines
        block, growth = np.empty((1, len(rows), 4), dtype=np.int32), GROWTH.take(np.frombuffer(rows.kinds, dtype=np.uint8), axis=0)
        table = block[0]
        lines: list[Any] = [None] * len(rows)
        for old, new, size in runs:
            table[new : new + size] = last[old : old + size]
            lines[new : new + size] = last_lines[old : old + size]
        again = [place - old + new for old, new, size in runs for place in self._fresh if old <= place < old + size]
        self._step, self._rows, self._row_lines, self._fresh, self.renewal = step, rows, lines, [], None
        self._ahead.begin(block, growth)
        self._find_lines(others)
        news = _News()
        self._look_at(others, news)
        self._count(runs, table[:, 1].tolist())
        self._look_at(sorted({*self._steady.beginning(), *again}.difference(others)), news)
        self.table_address = self._ahead.address
        return news.input(table)

    def advance(self, step: int) -> list[int]:
        """The step after the last one, of the same rows: each has one token more, wherever its tail is. The input is `table`, and `renewal`
        where there is one.

        Returns how many pages the rows have now that began one.
        """
        if step != self._step + 1:
            raise ValueError(f"step {step} does not follow step {self._step}")
        self._step = step
        steady = self._steady
        steady.age += 1
        self.table_address = self._ahead.advance()
        begin = steady.beginning()
        begun = self._begin_pages(begin) if begin else []
        self.renewal = self._renew() if self._fresh else None
        return begun

    def _count(self, runs: Sequence[Run], tokens: list[int]) -> None:
        """tokens: of the rows, here. Those of the runs go on where they stand in a page."""
        self._tokens, kinds = tokens, self._rows.kinds  # of the kinds, STAYS is false
        self._steady.age += 1
        if runs:
            self._steady = self._steady.moved(runs, (), tokens, kinds)
        else:
            self._steady = SteadyRows((), tokens, self.page_size, kinds)

    def _find_lines(self, indices: Sequence[int]) -> None:
        """Of rows that are not known to be the last step's."""
        keys, kinds, known = self._rows.keys, self._rows.kinds, self._lines
        if self._idle:
            for key in [keys[index] for index in indices if kinds[index] != POOLED]:
                self._idle.pop(key, None)
        lines = self._row_lines
        for index in indices:
            lines[index] = known.get(keys[index]) or self._new_line(keys[index], kinds[index] == POOLED)

    def _look_at(self, indices: Sequence[int], news: _News) -> None:
        """Makes the table's rows of these indices, whatever was known of them but their lines. Behind a prefill these are all rows."""
        rows, step, lines, page_size = self._rows, self._step, self._row_lines, self.page_size
        kinds, bases, places = rows.kinds, rows.bases, rows.places
        copies, copy_pages, fresh = news.copies, news.copy_pages, self._fresh
        found: list[int] = []
        for index in indices:
            line, length, page, slot = lines[index], bases[index] + step, NO_PAGE, NO_SLOT
            if kinds[index] == POOLED:
                tokens, needed, before = length, -(-length // page_size), line.num_pages
                may_have_changed = line.first_step >= step - 1
                if line.first_step == step:
                    fresh.append(index)
                if needed > 1 and (may_have_changed or needed > before + 1):
                    copies.append((line.entry, places[index]))
                    copy_pages = needed if needed > copy_pages else copy_pages
                elif may_have_changed or needed == before + 1:
                    page = self._last_page(index, needed)
                if needed > before:
                    line.num_pages = needed
            else:
                held = places[index]
                tokens = shard_tokens(held, length, page_size)
                page = self._list_held(index, -(-tokens // page_size), news)
                if kinds[index] == ARRIVES:
                    slot = slot_of(held, length - 1, page_size)
            found += (line.entry, tokens, page, slot)
        news.copy_pages = copy_pages
        if len(indices) <= _FEW:
            cells = self.table.data
            for place, index in enumerate(indices):
                cells[index, 0], cells[index, 1], cells[index, 2], cells[index, 3] = found[4 * place : 4 * place + 4]
        else:
            self.table[indices] = np.frombuffer(array("i", found), dtype=np.int32).reshape(-1, 4)

    def _list_held(self, index: int, needed: int, news: _News) -> int:
        """Sees to the pages of a listed row that has `needed` here. Returns the one that goes with the row's last token, or NO_PAGE."""
        line, held = self._row_lines[index], self._rows.places[index]
        before, line.num_pages = line.num_pages, max(line.num_pages, needed)
        if needed == before + 1:
            return self._last_page(index, needed)
        if needed > before:
            begin = line.entry * self.width
            news.places += range(begin + before, begin + needed)
            news.pages += [number for _, number in held[before:needed]]
        return NO_PAGE

    def _renew(self) -> RowsInput:
        """The second step of some pooled rows."""
        news, fresh, self._fresh = _News(), self._fresh, []
        self._look_at(fresh, news)
        return news.input(self.table)

    def _begin_pages(self, begin: Sequence[int]) -> list[int]:
        """The last token of these rows is the first of a page. Returns how many pages they have now."""
        begun, page_size, told, age = [], self.page_size, self._steady.told, self._steady.age
        for index in begin:
            needed = (told[index] + age - 1) // page_size + 1
            begun.append(needed)
            page = self._last_page(index, needed)
            self._ahead.put_page(index, page)
            self._row_lines[index].num_pages = needed
            if self._rows.kinds[index] == ARRIVES:
                self._ahead.put_slot(index, page * page_size)
        return begun

    def _last_page(self, index: int, needed: int) -> int:
        """The row's last page, its `needed`-th here, which is new in this step."""
        if needed > self.width:
            raise ValueError(f"a row has {needed} pages here, a line of the page table holds {self.width} (--context-length)")
        place = self._rows.places[index]
        page: int = FROM_TOKEN_TABLE - place if self._rows.kinds[index] == POOLED else place[needed - 1][1]
        return page

    def _leave(self, named: set[Hashable], gone: Sequence[int], *, goes_on: bool) -> None:
        """Notes who is not among the next step's rows, and forgets the pooled ones of them; all of those where steps lie between.

        named: keys of the next rows that are in no run; gone: places of the last ones that are in none."""
        for place in gone:
            key, line = self._rows.keys[place], self._row_lines[place]
            is_named = key in named
            if line.is_pooled and not (is_named and goes_on):
                self._free.append(self._lines.pop(key).entry)
            elif not line.is_pooled and not is_named:
                self._idle[key] = None

    def _new_line(self, key: Hashable, is_pooled: bool) -> _Line:
        if not self._free:
            longest = next(iter(self._idle))
            del self._idle[longest]
            self._free.append(self._lines.pop(longest).entry)
        line = self._lines[key] = _Line(self._free.pop(), self._step, is_pooled)
        return line
