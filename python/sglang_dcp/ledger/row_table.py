"""A home's sharded rows as every instance keeps them: told when they change, one token on otherwise.

A steady step costs the same whatever the number of rows: their positions follow from the table's age.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from sglang_dcp.ledger.digest import MASK, digest
from sglang_dcp.ledger.messages import Row
from sglang_dcp.ledger.steady import SteadyRows

_PER_TOKEN = 0x1E3779B97F4A7C15
"""What a checksum grows by per step: odd, so that no number of steps below 2^62 brings it back."""


def advance(rows: Iterable[Row]) -> tuple[Row, ...]:
    """The rows of the next step when nothing joined or left: every request decodes one token."""
    return tuple([Row(row.handle, row.prefix_len + row.num_new, 1, row.route) for row in rows])


def checksum(rows: Iterable[Row]) -> int:
    """Detects a row table that went apart between instances; fits one control column.

    A digest of the rows as seen from the first one's position, which does not change while all of them go on by one token, and that
    position apart. So a step costs one addition, and any change of a row, or of their order, gives another checksum.
    """
    rows = tuple(rows)
    if not rows:
        return 0
    first = rows[0].prefix_len
    words = [word for row in rows for word in (row.handle, row.prefix_len - first, row.num_new, row.route)]
    return digest(words) + first * _PER_TOKEN & MASK


class RowTable:
    """Rows in batch order. `advance` takes constant time from the second step after `tell` on."""

    __slots__ = ("_decodes", "_per_step", "_rows", "checksum")

    def __init__(self) -> None:
        self.tell(())

    def tell(self, rows: tuple[Row, ...]) -> None:
        self._rows = SteadyRows(rows, [row.prefix_len for row in rows])
        self.checksum = checksum(rows)
        self._decodes = all(row.num_new == 1 for row in rows)
        self._per_step = _PER_TOKEN if rows else 0

    def advance(self) -> None:
        if self._decodes:
            self.checksum = self.checksum + self._per_step & MASK
            self._rows.age += 1
        else:
            self.tell(advance(self._rows.keys))

    def next_checksum(self) -> int:
        """The checksum of the rows one step on."""
        return self.checksum + self._per_step & MASK if self._decodes else checksum(advance(self._rows.keys))

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def routes(self) -> list[int]:
        """Of the rows, which keep them until they are told again."""
        return [row.route for row in self._rows.keys]

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    @property
    def rows(self) -> tuple[Row, ...]:
        if self._rows.age:
            age = self._rows.age
            rows = tuple([Row(row.handle, row.prefix_len + age, 1, row.route) for row in self._rows.keys])
            self._rows = SteadyRows(rows, [row.prefix_len for row in rows])
        return tuple(self._rows.keys)
