"""Which retained sequences make room in one step, and for whom. Part of a decision: the same on every instance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from sglang_dcp.ledger.columns import FREE_PAGES, WANTED_PAGES
from sglang_dcp.ledger.messages import AskAdmission
from sglang_dcp.ledger.retained import Key, RetainedTable
from sglang_dcp.ledger.room import Room
from sglang_dcp.policy.split_limits import Split

REASONS = ("growth", "admission", "local", "share")
"""A running request grows, one is admitted, an instance's local requests need room, a pool retains more than its share."""


def is_due(retained: RetainedTable, columns: Sequence[Sequence[int]], most_retained: int) -> bool:
    """Whether a pool wants room that retained sequences could make, or retains more than its share. columns: of every instance."""
    return len(retained) > 0 and any(
        evictable and (pages > most_retained or row[FREE_PAGES] < row[WANTED_PAGES])
        for evictable, pages, row in zip(retained.evictable, retained.pages, columns, strict=True)
    )


class Eviction(NamedTuple):
    """A sequence whose pages are free from this step on. reason: an index of REASONS."""

    home: int
    handle: int
    reason: int


class Evictions:
    """Of one decision. Nothing is evicted for what would not fit even if all were."""

    def __init__(self, retained: RetainedTable, room: Room) -> None:
        self.retained, self.room = retained, room
        self.chosen: list[Eviction] = []

    def free_with_all(self) -> list[int]:
        """Free pages of every instance if all sequences that can be were evicted."""
        return [free + pages for free, pages in zip(self.room.free, self.retained.evictable, strict=True)]

    def make_room(self, needed: Mapping[int, int], reason: str, spare: Key | None = None) -> bool:
        """Evicts until instance r has needed[r] free pages. False when that cannot be; then nothing is evicted."""
        free = self.room.free
        return self._evict(self.retained.choose({rank: pages - free[rank] for rank, pages in needed.items()}, spare), reason)

    def for_admission(self, home: int, ask: AskAdmission, *, leaves: bool = True) -> Split | None:
        """The split of an ask that has room, or has some now that sequences were evicted for it. The one that it goes on from stays, and is
        nothing that growth can have. leaves: pages to growth."""
        room, retained, spare = self.room, self.retained, (home, ask.previous) if ask.previous else None
        evictable = retained.evictable if spare is None else retained.evictable_beside(spare)
        now = room if spare is None and leaves else Room(room.limits, room.free, room.guests, retained.pages if leaves else None, evictable)
        split = now.split(home, ask)
        if split is not None or not len(retained):
            return split
        free = [free + pages for free, pages in zip(room.free, evictable, strict=True)]
        left = [held - pages for held, pages in zip(retained.pages, evictable, strict=True)]
        split = Room(room.limits, free, room.guests, left if leaves else None, [0] * len(free)).split(home, ask)
        return split if split is not None and self.make_room(dict(split), "admission", spare) else None

    def for_locals(self, wanted: Sequence[int], promised: Sequence[int]) -> None:
        """wanted[r]: free pages that instance r asks for, for requests that are no business of the ledger; what is promised is free too."""
        for rank, pages in enumerate(wanted):
            if pages:
                self.make_room({rank: pages - promised[rank]}, "local")

    def keep_shares(self, most_pages: int) -> None:
        """No pool retains more than this, but for what running requests read."""
        for rank, pages in enumerate(self.retained.pages):
            if pages > most_pages:
                self._evict(self.retained.choose({rank: min(pages - most_pages, self.retained.evictable[rank])}), "share")

    def _evict(self, keys: list[Key] | None, reason: str) -> bool:
        for key in keys or ():
            sequence = self.retained.take(key)
            assert sequence is not None
            self.room.give(sequence.pages)
            self.chosen.append(Eviction(*key, REASONS.index(reason)))
        return keys is not None
