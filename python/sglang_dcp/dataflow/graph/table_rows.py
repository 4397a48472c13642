"""The rows that a captured step's tables are made of."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, overload

from sglang_dcp.ledger.kept_runs import Run

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


STAYS, GROWS, ARRIVES, POOLED = range(4)
"""Kinds of rows: listed ones without the new token, with it, and with it from its home; pooled ones."""


@dataclass(slots=True, eq=False)
class TableRows(Sequence[ListedRow | PooledRow]):
    """A step's attention rows as one list of each of their facts, which are moved as slices; a row is made where one is looked at.

    bases: lengths less the step's number, which steady rows keep. places: pages held here, or the line of the token table. runs: of the
    rows `came_from` (their `name`), those that are one token on with every step since.
    """

    step: int = 0
    keys: list[Hashable] = field(default_factory=list)
    bases: list[int] = field(default_factory=list)
    kinds: bytearray = field(default_factory=bytearray)
    places: list[Any] = field(default_factory=list)
    name: object = field(default_factory=object)
    came_from: object = None
    runs: list[Run] = field(default_factory=list)

    @classmethod
    def of(cls, step: int, rows: Sequence[ListedRow | PooledRow]) -> TableRows:
        if isinstance(rows, TableRows):
            return rows
        found = cls(step)
        for row in rows:
            if isinstance(row, PooledRow):
                found.append(row.key, row.length, POOLED, row.line)
            else:
                found.append(row.key, row.length, ARRIVES if row.arrives else GROWS if row.grows else STAYS, row.held)
        return found

    def append(self, key: Hashable, length: int, kind: int, place: HeldPages | int) -> None:
        self.keys.append(key)
        self.bases.append(length - self.step)
        self.kinds.append(kind)
        self.places.append(place)

    def extend(self, rows: TableRows, part: slice = slice(None)) -> None:
        """With these of other rows, as they are now."""
        self.keys += rows.keys[part]
        self.bases += rows.bases[part]
        self.kinds += rows.kinds[part]
        self.places += rows.places[part]

    def __len__(self) -> int:
        return len(self.keys)

    @overload
    def __getitem__(self, index: int) -> ListedRow | PooledRow: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[ListedRow | PooledRow]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        key, length, kind, place = self.keys[index], self.bases[index] + self.step, self.kinds[index], self.places[index]
        if kind == POOLED:
            return PooledRow(key, place, length)
        return ListedRow(key, length, place, kind != STAYS, kind == ARRIVES)
