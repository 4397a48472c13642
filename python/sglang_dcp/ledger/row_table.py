"""A home's sharded rows as every instance keeps them: told when they change, one token on otherwise.

A steady step costs the same whatever the number of rows: their positions follow from the table's age.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from sglang_dcp.ledger.messages import Row

_MODULUS = 2_147_483_647
_RADIX = 1_000_003
_POSITION_WEIGHT = 31


def advance(rows: Iterable[Row]) -> tuple[Row, ...]:
    """The rows of the next step when nothing joined or left: every request decodes one token."""
    return tuple(Row(row.handle, row.prefix_len + row.num_new, 1, row.route) for row in rows)


def checksum(rows: Iterable[Row]) -> int:
    """Detects a row table that went apart between instances; fits one control column. Linear in every position."""
    value = 0
    for row in rows:
        value = (value * _RADIX + row.handle * 8191 + row.prefix_len * _POSITION_WEIGHT + row.num_new + row.route * 127) % _MODULUS
    return value


class RowTable:
    """Rows in batch order. `advance` takes constant time from the second step after `tell` on."""

    def __init__(self) -> None:
        self.tell(())

    def tell(self, rows: tuple[Row, ...]) -> None:
        self._told, self._age = rows, 0
        self.checksum = checksum(rows)
        self._decodes = all(row.num_new == 1 for row in rows)
        weight = 0
        for _ in rows:
            weight = (weight * _RADIX + 1) % _MODULUS
        self._slope = weight * _POSITION_WEIGHT % _MODULUS

    def advance(self) -> None:
        if self._decodes:
            self.checksum = self.next_checksum()
            self._age += 1
        else:
            self.tell(advance(self._told))

    def next_checksum(self) -> int:
        """The checksum of the rows one step on."""
        return (self.checksum + self._slope) % _MODULUS if self._decodes else checksum(advance(self._told))

    def __len__(self) -> int:
        return len(self._told)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    @property
    def rows(self) -> tuple[Row, ...]:
        if self._age:
            self._told = tuple(Row(row.handle, row.prefix_len + self._age, 1, row.route) for row in self._told)
            self._age = 0
        return self._told
