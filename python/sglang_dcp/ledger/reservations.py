"""Who gets pages, and in what order. Every instance keeps this table and computes the same grants from the same words.

Rules, and why:
- Growth before admission, each in the total order (born, home, handle). A running request is never held up by one that has not started,
  so running requests always finish and waiting ones always start: no deadlock.
- Admission is all or nothing. While the first waiting ask does not fit, what its split needs is promised to it, pages that are still
  taken included: nobody behind it (nor a local request, see `Decision.promised`) may take them when they become free, so short requests
  cannot starve a long one. A stuck growth is promised one page wherever it may grow, for the same reason.
- Where growth goes is the policy's rule (policy/growth.py), the same that the simulator runs.
- Stuck growth with no page anywhere makes a victim: the youngest stuck request, as soon as two are stuck or nothing else runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from sglang_dcp.ledger.digest import OpenDigest
from sglang_dcp.ledger.messages import AskAdmission, AskGrowth
from sglang_dcp.policy.growth import next_tail

Key = tuple[int, int]
"""(home, handle)"""

Ask = TypeVar("Ask", AskAdmission, AskGrowth)


@dataclass(frozen=True, slots=True)
class GrantedSegment:
    rank: int
    first_index: int
    num_pages: int


@dataclass(frozen=True, slots=True)
class Grant:
    home: int
    handle: int
    segments: tuple[GrantedSegment, ...]


@dataclass(frozen=True, slots=True)
class Decision:
    """Outcome of one step. New local requests leave `promised[r]` pages of instance r free; it may have fewer free ones now."""

    grants: tuple[Grant, ...]
    promised: tuple[int, ...]
    victims: tuple[Key, ...]


class ReservationTable:
    """Open asks of all homes. Fed with the same messages in the same order everywhere."""

    def __init__(self, num_instances: int, nodes: Sequence[int] | None = None) -> None:
        self.num_instances = num_instances
        self.nodes = list(nodes or [0] * num_instances)
        self._admissions: dict[Key, AskAdmission] = {}
        self._growths: dict[Key, AskGrowth] = {}
        self._digest = OpenDigest()

    def __len__(self) -> int:
        return len(self._admissions) + len(self._growths)

    @property
    def digest(self) -> int:
        """Of the open asks: the same on all instances, or they have gone apart."""
        return self._digest.value

    def ask(self, home: int, ask: AskAdmission | AskGrowth) -> None:
        """Opens an ask, or replaces the open one of the same handle."""
        self._digest.put((ask.KIND, home, ask.handle), (ask.KIND, home, *ask.words()))
        if isinstance(ask, AskAdmission):
            self._admissions[home, ask.handle] = ask
        else:
            self._growths[home, ask.handle] = ask

    def withdraw(self, home: int, handle: int) -> None:
        for asks in (self._admissions, self._growths):
            self._close(asks, (home, handle))

    def _close(self, asks: dict[Key, AskAdmission] | dict[Key, AskGrowth], key: Key) -> None:
        ask = asks.pop(key, None)
        if ask is not None:
            self._digest.take((ask.KIND, *key))

    def decide(
        self, free: Sequence[int], guest_room: Sequence[int], anybody_runs: bool, levels: Sequence[float] | None = None
    ) -> Decision:
        """Grants of this step; granted asks leave the table.

        free[r]: pages that instance r can give now (evictable cache included). guest_room[r]: guest pages that admission may still
        put there. anybody_runs: some instance has tokens in this step's batch. levels[r]: predicted level, where growth may choose.
        """
        room, guests = list(free), list(guest_room)
        grants, stuck = self._decide_growth(room, levels or [0.0] * self.num_instances)
        promised = [0] * self.num_instances
        somebody_waits = False
        for key, ask in self._in_order(self._admissions):
            split = self._split(key[0], ask, room, guests)
            if split is None:
                if not somebody_waits:
                    somebody_waits = True
                    for rank, pages in ask.segments:
                        promised[rank] += pages
                        room[rank] -= pages
                        guests[rank] -= pages if rank != key[0] else 0
                continue
            grants.append(_grant(key, split, 0))
            self._close(self._admissions, key)
            for rank, pages in split:
                room[rank] -= pages
                guests[rank] -= pages if rank != key[0] else 0
        for key in stuck:
            for rank in self._may_grow_on(key):
                promised[rank] += 1
        victims = (stuck[-1],) if len(stuck) > 1 or (stuck and not anybody_runs and not grants) else ()
        return Decision(tuple(grants), tuple(promised), victims)

    def _may_grow_on(self, key: Key) -> Sequence[int]:
        ask = self._growths[key]
        return range(self.num_instances) if len(set(ask.shards)) < ask.max_degree else sorted(set(ask.shards))

    def _decide_growth(self, room: list[int], levels: Sequence[float]) -> tuple[list[Grant], list[Key]]:
        grants, stuck = [], []
        for key, ask in self._in_order(self._growths):
            rank = next_tail(key[0], ask.shards, room, max_degree=ask.max_degree, levels=levels, nodes=self.nodes)
            if rank is None:
                if ask.stuck:
                    stuck.append(key)
                continue
            room[rank] -= 1
            grants.append(_grant(key, ((rank, 1),), ask.page_index))
            self._close(self._growths, key)
        return grants, stuck

    def _split(self, home: int, ask: AskAdmission, room: list[int], guests: list[int]) -> tuple[tuple[int, int], ...] | None:
        limits = [room[r] if r == home else min(room[r], guests[r]) for r in range(self.num_instances)]
        if all(pages <= limits[rank] for rank, pages in ask.segments):
            return ask.segments
        if not ask.flexible:
            return None
        split = split_by_room(home, sum(pages for _, pages in ask.segments), limits)
        # What asked for one instance is short: in pieces it would cost an exchange in each of its steps. It waits; its promise makes room.
        return split if split is None or len(ask.segments) > 1 or len(split) == 1 else None

    @staticmethod
    def _in_order(asks: dict[Key, Ask]) -> list[tuple[Key, Ask]]:
        return sorted(asks.items(), key=lambda item: (item[1].born, *item[0]))


def split_by_room(home: int, num_pages: int, limits: Sequence[int]) -> tuple[tuple[int, int], ...] | None:
    """Splits pages over the instances with most room so that as few as possible are used and they end equally empty; the home, when used,
    is last (the tail). None when they do not fit."""
    limits = [max(0, limit) for limit in limits]
    if sum(limits) < num_pages:
        return None
    order = sorted(range(len(limits)), key=lambda rank: (-limits[rank], rank != home, rank))
    chosen: list[int] = []
    while sum(limits[rank] for rank in chosen) < num_pages:
        chosen.append(order[len(chosen)])
    left, surplus = num_pages, sum(limits[rank] for rank in chosen) - num_pages
    counts = {}
    for position, rank in enumerate(sorted(chosen, key=lambda rank: limits[rank])):
        spare = min(limits[rank], surplus // (len(chosen) - position))
        counts[rank] = limits[rank] - spare
        surplus -= spare
        left -= counts[rank]
    assert left == 0
    return tuple((rank, counts[rank]) for rank in sorted(counts, key=lambda rank: (rank == home, rank)) if counts[rank])


def _grant(key: Key, split: Sequence[tuple[int, int]], first_index: int) -> Grant:
    segments = []
    for rank, pages in split:
        segments.append(GrantedSegment(rank, first_index, pages))
        first_index += pages
    return Grant(*key, tuple(segments))
