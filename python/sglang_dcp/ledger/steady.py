"""Rows that decode together: told once, then one token on with every step, until anything about them changes.

Most steps are the last one, one token on. What a step then asks (who begins a page, who is about to end one, where a row stands) is looked
up by the age of the rows, whatever their number. Where rows join or leave, the others go on: nothing of theirs is looked at.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sglang_dcp.ledger.kept_runs import Run, stretches


class SteadyRows:
    """One step on costs its callers no call of ours: they count `age` themselves.

    keys: name the rows, in order. tokens: of each when it was told. age: steps since, counted by whoever told them; each added a token
    to every row of `growing` (a truth per row; None: to all). told: tokens of each at age 0, whether or not it was there then."""

    __slots__ = ("_page_size", "_phases", "age", "keys", "told")

    def __init__(self, keys: Sequence[Any], tokens: Sequence[int], page_size: int = 1, growing: Iterable[Any] | None = None) -> None:
        self.keys, self.told = keys, tokens
        self.age = 0
        self._page_size = page_size
        # Where in a page a row's last token was at age 0, a character per row: Python looks for one in C, and moves them by slices.
        # That of a row that does not grow is never looked for.
        if growing is None:
            self._phases = "".join([chr(told % page_size) for told in tokens])
        else:
            pairs = zip(tokens, growing, strict=True)
            self._phases = "".join([chr(told % page_size if grows else page_size) for told, grows in pairs])

    def moved(
        self, runs: Sequence[Run], keys: Sequence[Any], tokens: Mapping[int, int] | Sequence[int], growing: Sequence[Any] | None = None
    ) -> SteadyRows:
        """The rows `keys` (of `growing`, where these have no names), those of `runs` being these, which are not looked at. tokens: now, of
        all, or of the others by index. The age goes on."""
        rows, page_size = SteadyRows.__new__(SteadyRows), self._page_size
        age = rows.age = self.age
        told, phases, old_told, old_phases = [], [], self.told, self._phases
        for joined, stretch in stretches(runs, len(keys if growing is None else growing)):
            for index in joined:
                at_start = tokens[index] - age
                told.append(at_start)
                phases.append(chr(at_start % page_size if growing is None or growing[index] else page_size))
            told += old_told[stretch]
            phases.append(old_phases[stretch])
        rows.keys, rows.told, rows._page_size, rows._phases = keys, told, page_size, "".join(phases)
        return rows

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
        phases, phase = self._phases, chr((1 - self.age - ahead) % self._page_size)
        found, place = [], phases.find(phase)
        while place >= 0:
            found.append(place)
            place = phases.find(phase, place + 1)
        return found

    def near_end(self, tokens: int, ahead: int = 0) -> Sequence[int]:
        """Likewise of the rows whose last page has room for at most `tokens` more; 0: whose last token ends a page."""
        if not tokens:
            return self.beginning(ahead + 1)
        distances = range(min(tokens + 1, self._page_size))
        return sorted(index for left in distances for index in self.beginning(ahead + 1 + left))
