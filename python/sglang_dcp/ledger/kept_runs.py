"""What two lists have in common where few entries left or joined: the stretches that stayed.

A batch of a hundred requests that one leaves and another joins is two stretches. What is known of its rows is moved by them, as slices;
one by one are looked at those that joined.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from itertools import compress, count, groupby
from operator import eq, ne
from typing import Any

Run = tuple[int, int, int]
"""(place before, place now, entries): so many entries are the same in both."""


def kept_runs(before: Sequence[Any], now: Sequence[Any]) -> list[Run]:
    """Stretches that both lists have, ascending in both; no entry is in two of them. Complete where those that stayed kept their order;
    where they did not, some that stayed are in none: they are taken for others that joined."""
    runs: list[Run] = []
    old = new = 0
    while old < len(before) and new < len(now):
        if before[old] != now[new]:
            try:
                old = before.index(now[new], old + 1)
            except ValueError:
                new += 1
                continue
        most = min(len(before) - old, len(now) - new)
        if before[old : old + most] == now[new : new + most]:
            same = most
        else:
            same = next(compress(count(), map(ne, before[old : old + most], now[new : new + most])))
        runs.append((old, new, same))
        old, new = old + same, new + same
    return runs


def stretches(runs: Iterable[Run], size: int) -> Iterator[tuple[range, slice]]:
    """The `size` places now, in order: those that are in no run, and the places before of the run behind them; at last an empty slice."""
    end = 0
    for old, new, kept in runs:
        yield range(end, new), slice(old, old + kept)
        end = new + kept
    yield range(end, size), slice(0, 0)


def left(runs: Iterable[Run], size: int) -> list[int]:
    """Which of the `size` places before are in no run."""
    found: list[int] = []
    end = 0
    for old, _, kept in runs:
        found += range(end, old)
        end = old + kept
    found += range(end, size)
    return found


def joined(runs: Iterable[Run], size: int) -> list[int]:
    """Which of the `size` places now are in no run."""
    return left([(new, old, kept) for old, new, kept in runs], size)


def narrowed(runs: Iterable[Run], before: Sequence[Any], now: Sequence[Any]) -> list[Run]:
    """The parts of the runs where these two agree as well. Lists or bytes, as long as the ones that the runs are of."""
    found: list[Run] = []
    for old, new, size in runs:
        was, became = before[old : old + size], now[new : new + size]
        if was == became:
            found.append((old, new, size))
            continue
        begin = 0
        for agree, group in groupby(map(eq, was, became)):
            length = sum(1 for _ in group)
            if agree:
                found.append((old + begin, new + begin, length))
            begin += length
    return found


def without(runs: Iterable[Run], places: Iterable[int]) -> list[Run]:
    """The runs, less these places of now, ascending."""
    found = list(runs)
    for place in places:
        index = next((i for i, (_, new, size) in enumerate(found) if new <= place < new + size), None)
        if index is not None:
            old, new, size = found[index]
            parts = (old, new, place - new), (old + place - new + 1, place + 1, new + size - place - 1)
            found[index : index + 1] = [part for part in parts if part[2]]
    return found


def squeezed(runs: Iterable[Run], absent_before: Sequence[int], absent: Sequence[int]) -> list[Run]:
    """The runs of two lists out of which these places, ascending, are taken; who is absent now was so before, where it is in a run."""
    return [(old - bisect_left(absent_before, old), new - bisect_left(absent, new), size) for old, new, size in without(runs, absent)]
