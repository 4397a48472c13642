"""A home's sharded rows as every instance keeps them: told when they change, one token on otherwise.

A steady step costs the same whatever the number of rows: their positions follow from the table's age.
"""

from __future__ import annotations

from collections.abc import Iterator

from sglang_dcp.ledger.digest import MASK, digest
from sglang_dcp.ledger.messages import Row, RowColumns

_PER_TOKEN = 0x1E3779B97F4A7C15
"""What a checksum grows by per step: odd, so that no number of steps below 2^62 brings it back."""
_NO_ROWS = RowColumns([], [], [], [])


def advance(rows: RowColumns) -> RowColumns:
    """The rows of the next step when nothing joined or left: every request decodes one token."""
    ends = [prefix_len + num_new for prefix_len, num_new in zip(rows.prefix_lens, rows.nums_new, strict=True)]
    return RowColumns(rows.handles, ends, [1] * len(ends), rows.routes)


def checksum(rows: RowColumns) -> int:
    """Detects a row table that went apart between instances; fits one control column.

    A digest of the rows as seen from the first one's position, which does not change while all of them go on by one token, and that
    position apart. So a step costs one addition, and any change of a row, or of their order, gives another checksum.
    """
    if rows.checksum is None:
        first = rows.prefix_lens[0] if rows.prefix_lens else 0
        positions = [prefix_len - first for prefix_len in rows.prefix_lens]
        words = digest([*rows.handles, *positions, *rows.nums_new, *rows.routes]) if positions else 0
        rows.checksum = words + first * _PER_TOKEN & MASK
    return rows.checksum


class RowTable:
    """Rows in batch order. `advance` takes constant time from the second step after `tell` on.

    told: the rows `age` steps ago; the same object for as long as nobody told others.
    """

    __slots__ = ("_decodes", "_per_step", "age", "checksum", "told")

    def __init__(self) -> None:
        self.tell(_NO_ROWS)

    def tell(self, rows: RowColumns) -> None:
        self.told, self.age = rows, 0
        self.checksum = checksum(rows)
        self._decodes = rows.nums_new.count(1) == len(rows)
        self._per_step = _PER_TOKEN if rows.handles else 0

    def advance(self) -> None:
        if self._decodes:
            self.checksum = self.checksum + self._per_step & MASK
            self.age += 1
        else:
            self.tell(advance(self.told))

    def next_checksum(self) -> int:
        """The checksum of the rows one step on."""
        return self.checksum + self._per_step & MASK if self._decodes else checksum(advance(self.told))

    def __len__(self) -> int:
        return len(self.told.handles)

    @property
    def routes(self) -> list[int]:
        """Of the rows, which keep them until they are told again."""
        return self.told.routes

    def __iter__(self) -> Iterator[Row]:
        age = self.age
        return (Row(row.handle, row.prefix_len + age, row.num_new, row.route) for row in self.told)

    @property
    def rows(self) -> tuple[Row, ...]:
        return tuple(self)
