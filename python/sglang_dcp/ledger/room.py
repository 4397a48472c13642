"""What instances can give in one step, as grants use it up."""

from __future__ import annotations

from collections.abc import Sequence

from sglang_dcp.ledger.messages import AskAdmission
from sglang_dcp.policy.split_limits import Split, SplitLimits


class Room:
    """free[r]: pages of instance r that nobody has. guests[r]: pages that new guests may still take there. Either may fall below 0: what is
    promised is taken, also where it is not there yet.

    Admission leaves pages to growth where somebody is in the pool, unless `retained` is None. retained[r]: its pages that are nobody's and
    not free; evictable[r]: those of them that growth can have. Both follow what is evicted or taken over, `refresh` behind the latter.
    """

    def __init__(
        self,
        limits: SplitLimits,
        free: Sequence[int],
        guest_room: Sequence[int],
        retained: Sequence[int] | None = None,
        evictable: Sequence[int] = (),
    ) -> None:
        self.limits, self._retained, self._evictable = limits, retained, evictable
        self._lends_a_part = limits.guest_pages < limits.pool_pages
        self.free, self.guests = list(free), list(guest_room)
        self._for_guests = [self._for_guest(rank) for rank in range(len(free))]
        self._richest: dict[range, list[int]] = {}

    def take(self, home: int, split: Sequence[tuple[int, int]], kept: Sequence[tuple[int, int]] = ()) -> None:
        """kept: pages of a retained sequence that are taken over: they were not free, and are guests' again."""
        for rank, pages in split:
            self.free[rank] -= pages
        for rank, pages in (*split, *kept) if self._lends_a_part else split:
            if rank != home:
                self.guests[rank] -= pages
        for rank, _ in (*split, *kept):
            self._for_guests[rank] = self._for_guest(rank)
        self._richest.clear()

    def give(self, pages: Sequence[tuple[int, int]]) -> None:
        """Pages of an instance that somebody has given up."""
        for rank, count in pages:
            self.free[rank] += count
            self._for_guests[rank] = self._for_guest(rank)
        self._richest.clear()

    def set_aside(self, pages: Sequence[int]) -> None:
        """Takes pages[r] of every instance, whoever gets them."""
        if any(pages):
            self.free = [free - kept for free, kept in zip(self.free, pages, strict=True)]
            self.refresh()

    def refresh(self) -> None:
        """Other pages are evictable than before."""
        self._for_guests = [self._for_guest(rank) for rank in range(len(self.free))]
        self._richest.clear()

    def split(self, home: int, ask: AskAdmission) -> Split | None:
        """The ask's own split where that has room; for a flexible one else any that has, None when none has. What asks for one instance
        moves whole or waits: in pieces it would cost an exchange in each of its steps."""
        for_guests = self._beside(home, ask.taken) if ask.taken and self._lends_a_part else self._for_guests
        if for_guests is None:
            return None
        at_home, pages, fits = max(0, self._admissible(home)), 0, True
        for rank, count in ask.segments:
            pages += count
            fits = fits and count <= (at_home if rank == home else for_guests[rank])
        if fits:
            return ask.segments
        if not ask.flexible:
            return None
        if ask.kept:
            room = list(for_guests)
            room[home] = at_home
            return self.limits.split(home, pages, room, ask.kept)
        most_shards = len(ask.segments) if len(ask.segments) == 1 else self.limits.max_degree
        scope = self.limits.scope(home, pages)
        # Most that wait are refused by this alone: no split of a request of this home over these ranks holds more.
        richest = self._most_for_guests(scope)
        if pages > sum(richest[:most_shards]) + at_home - min(at_home, for_guests[home]):
            return None
        room = list(for_guests)
        room[home] = at_home
        if most_shards > 1:
            return self.limits.split(home, pages, room)
        best = max(scope, key=lambda rank: (room[rank], rank == home, -rank))
        return ((best, pages),) if room[best] >= pages else None

    def _beside(self, home: int, kept: Sequence[tuple[int, int]]) -> list[int] | None:
        """Pages that a guest could take of every instance beside those that it takes over; None where these are too many."""
        room = list(self._for_guests)
        for rank, count in kept:
            if rank != home:
                room[rank] = min(room[rank], self.guests[rank] - count)
        return room if min(room) >= 0 else None

    def _admissible(self, rank: int) -> int:
        """Free pages of an instance but for those that are left to growth."""
        free = self.free[rank]
        if self._retained is None:
            return free
        left = self.limits.left_to_growth(free, self._retained[rank]) - self._evictable[rank]
        return free - left if left > 0 else free

    def _for_guest(self, rank: int) -> int:
        """Pages that a new guest could take of an instance."""
        free, guests = self._admissible(rank), self.guests[rank]
        least = free if free < guests else guests
        return least if least > 0 else 0

    def _most_for_guests(self, scope: range) -> list[int]:
        """The same of the ranks of a scope, most first. Ordered once for all asks until room is taken."""
        if scope not in self._richest:
            self._richest[scope] = sorted([self._for_guests[rank] for rank in scope], reverse=True)
        return self._richest[scope]
