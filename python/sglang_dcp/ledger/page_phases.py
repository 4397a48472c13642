"""Which rows of a batch begin or end a page in which step, where every row gets a token per step: told once, then looked up."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class PagePhases:
    """rows: (index, tokens) of each row at age 0; a row has one token more with every step of age."""

    def __init__(self, rows: Iterable[tuple[int, int]], page_size: int) -> None:
        self._page_size = page_size
        self._by_remainder: dict[int, list[int]] = {}
        for index, tokens in rows:
            self._by_remainder.setdefault(tokens % page_size, []).append(index)

    def beginning(self, age: int) -> Sequence[int]:
        """Indices, ascending, of the rows whose last token is the first of a page."""
        return self._by_remainder.get((1 - age) % self._page_size, ())

    def near_end(self, age: int, tokens: int) -> Sequence[int]:
        """Likewise of the rows whose last page has room for at most `tokens` more; 0: whose last token ends a page."""
        if not tokens:
            return self._by_remainder.get(-age % self._page_size, ())
        distances = range(min(tokens + 1, self._page_size))
        return sorted(index for left in distances for index in self._by_remainder.get((-left - age) % self._page_size, ()))
