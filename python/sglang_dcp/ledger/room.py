"""What instances can give in one step, as grants use it up."""

from __future__ import annotations

from collections.abc import Sequence

from sglang_dcp.ledger.messages import AskAdmission
from sglang_dcp.policy.split_limits import Split, SplitLimits


class Room:
    """free[r]: pages of instance r that nobody has. guests[r]: pages that new guests may still take there. Either may fall below 0: what is
    promised is taken, also where it is not there yet."""

    def __init__(self, limits: SplitLimits, free: Sequence[int], guest_room: Sequence[int]) -> None:
        self.limits = limits
        self.free, self.guests = list(free), list(guest_room)
        self._most: dict[range, int] = {}

    def take(self, home: int, split: Sequence[tuple[int, int]]) -> None:
        for rank, pages in split:
            self.free[rank] -= pages
            if rank != home:
                self.guests[rank] -= pages
        self._most.clear()

    def set_aside(self, pages: Sequence[int]) -> None:
        """Takes pages[r] of every instance, whoever gets them."""
        self.free = [free - kept for free, kept in zip(self.free, pages, strict=True)]
        self._most.clear()

    def split(self, home: int, ask: AskAdmission) -> Split | None:
        """The ask's own split where that has room; for a flexible one else any that has, None when none has. What asks for one instance
        moves whole or waits: in pieces it would cost an exchange in each of its steps."""
        if all(pages <= (self.free[rank] if rank == home else self._for_guest(rank)) for rank, pages in ask.segments):
            return ask.segments
        if not ask.flexible:
            return None
        pages = sum(count for _, count in ask.segments)
        scope = self.limits.scope(home, pages)
        if len(ask.segments) > 1 and pages > self._at_most(home, scope):
            return None
        room = [self.free[rank] if rank == home else self._for_guest(rank) for rank in range(len(self.free))]
        if len(ask.segments) > 1:
            return self.limits.split(home, pages, room)
        best = max(scope, key=lambda rank: (room[rank], rank == home, -rank))
        return ((best, pages),) if room[best] >= pages else None

    def _for_guest(self, rank: int) -> int:
        return max(0, min(self.free[rank], self.guests[rank]))

    def _at_most(self, home: int, scope: range) -> int:
        """No split of a request of `home` over these ranks holds more. Counted once for all asks until room is taken: most that wait are
        refused by this alone."""
        if scope not in self._most:
            self._most[scope] = sum(sorted(map(self._for_guest, scope), reverse=True)[: self.limits.max_degree])
        return self._most[scope] + max(0, self.free[home]) - min(max(0, self.free[home]), self._for_guest(home))
