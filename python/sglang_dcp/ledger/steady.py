"""Rows that decode together: told once, then one token on with every step, until anything about them changes.

Most steps are the last one, one token on. What a step then asks (who begins a page, who is about to end one, where a row stands) is looked
up by the age of the rows, whatever their number.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


class SteadyRows:
    """One step on costs its callers no call of ours: they count `age` themselves.

    keys: name the rows, in order. tokens: of each when it was told. age: steps since, counted by whoever told them; each added a token
    to every row of `growing` (None: to all)."""

    __slots__ = ("_by_remainder", "_growing", "_page_size", "age", "keys", "told")

    def __init__(self, keys: Sequence[Any], tokens: Sequence[int], page_size: int = 1, growing: Iterable[int] | None = None) -> None:
        self.keys, self.told = keys, tokens
        self.age = 0
        self._page_size, self._growing = page_size, growing
        self._by_remainder: dict[int, list[int]] | None = None

    def __len__(self) -> int:
        return len(self.told)

    def are(self, keys: Sequence[Any], last_tokens: int, ahead: int) -> bool:
        """Whether `keys` are these rows, `ahead` tokens on from now: the same objects in the same order, and the last one's length tells
        for all of them."""
        return self.keys == keys and (not keys or last_tokens == self.told[-1] + self.age + ahead)

    def tokens(self, index: int) -> int:
        """Of a growing row, now."""
        return self.told[index] + self.age

    def beginning(self, ahead: int = 0) -> Sequence[int]:
        """Indices, ascending, of the rows whose last token, `ahead` tokens on, is the first of a page."""
        phases = self._by_remainder
        return (self._phases() if phases is None else phases).get((1 - self.age - ahead) % self._page_size, ())

    def near_end(self, tokens: int, ahead: int = 0) -> Sequence[int]:
        """Likewise of the rows whose last page has room for at most `tokens` more; 0: whose last token ends a page."""
        phases, age = self._by_remainder, self.age + ahead
        if phases is None:
            phases = self._phases()
        if not tokens:
            return phases.get(-age % self._page_size, ())
        distances = range(min(tokens + 1, self._page_size))
        return sorted(index for left in distances for index in phases.get((-left - age) % self._page_size, ()))

    def _phases(self) -> dict[int, list[int]]:
        """Rows by where in a page their last token was when told. Made when first asked for: many rows are told for one step."""
        phases: dict[int, list[int]] = {}
        told, page_size = self.told, self._page_size
        for index in range(len(told)) if self._growing is None else self._growing:
            phases.setdefault(told[index] % page_size, []).append(index)
        self._by_remainder = phases
        return phases
