"""Open asks in the total order (born, home, handle), looked at in turn so that a step's work does not grow with their number."""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from typing import Generic, TypeVar

from sglang_dcp.ledger.messages import AskAdmission, AskGrowth
from sglang_dcp.policy.growth import Order

Key = tuple[int, int]
"""(home, handle)"""

Ask = TypeVar("Ask", AskAdmission, AskGrowth)


class OpenAsks(Generic[Ask]):
    """At most one ask per key. Putting, taking and looking at one cost the same however many are open, near enough."""

    def __init__(self) -> None:
        self.by_key: dict[Key, Ask] = {}
        self._order: list[Order] = []
        self._turn: Order | None = None

    def __len__(self) -> int:
        return len(self.by_key)

    def put(self, home: int, ask: Ask) -> None:
        """Opens an ask, or replaces the open one of its key."""
        self.take((home, ask.handle))
        self.by_key[home, ask.handle] = ask
        bisect.insort(self._order, (ask.born, home, ask.handle))

    def take(self, key: Key) -> Ask | None:
        """Removes and returns the ask of a key, None when there is none."""
        ask = self.by_key.pop(key, None)
        if ask is not None:
            del self._order[bisect.bisect_left(self._order, (ask.born, *key))]
        return ask

    def youngest(self) -> tuple[Order, Ask] | None:
        """The last in the order."""
        return (self._order[-1], self.by_key[self._order[-1][1:]]) if self._order else None

    def in_turn(self) -> Iterator[tuple[Order, Ask]]:
        """The oldest first, and on until one of them stays; then the others, from behind the last one that was looked at if the caller
        stopped early last time, else in order. The caller may take what it has just been given, and nothing else."""
        head = None
        while self._order and self._order[0] != head:
            head = self._order[0]
            yield head, self.by_key[head[1:]]
        if not self._order:
            self._turn = None
            return
        assert head is not None
        current = max(self._turn or head, head)  # all up to that one may be gone
        for _ in range(len(self._order) - 1):
            position = bisect.bisect_right(self._order, current)
            if position == len(self._order):
                position = 1
            current = self._turn = self._order[position]
            yield current, self.by_key[current[1:]]
        self._turn = None
