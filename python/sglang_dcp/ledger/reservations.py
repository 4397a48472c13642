"""Who gets pages, and in what order. Every instance keeps this table and computes the same grants from the same words.

Rules, and why:
- Growth before admission, each in the total order (born, home, handle). A running request is never held up by one that has not started,
  so running requests always finish and waiting ones always start: no deadlock.
- Admission leaves pages to growth where somebody is in a pool (SplitLimits.left_to_growth): every ask, and every local request, is a little
  larger, up to the pool. Until it has waited long: in a pool where somebody always is, it would wait for ever.
- Admission is all or nothing. While the first waiting ask does not fit, what its split needs is promised to it, pages that are still
  taken included: nobody behind it (nor a local request, see `Decision.promised`) may take them when they become free, so short requests
  cannot starve a long one. It holds them up for half of its wait at most (promise_turns.py), so a long one cannot stop the short ones.
  A stuck growth is promised one page wherever it may grow.
- No split leaves the limits (policy/split_limits.py): every open ask could be granted on an empty cluster, so no promise is for ever.
- Pages of retained sequences are nobody's: what would fit if some were evicted gets them evicted, in the order of retained.py. So a waiting
  ask never holds a page, not even of the sequence that it would take over.
- Where growth goes, and who yields, is the policy's rule (policy/growth.py), the same that the simulator runs.
- A step looks at the first ask and at no more than MOST_REFUSED of those that have to wait, in turn: its work is bounded whatever waits.
  The first ask is looked at in every step and keeps its promise, so everybody's turn comes. (What is granted is work of its own.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sglang_dcp.ledger.digest import MASK, OpenDigest
from sglang_dcp.ledger.eviction import Eviction, Evictions
from sglang_dcp.ledger.messages import AskAdmission, AskGrowth
from sglang_dcp.ledger.open_asks import Ask, Key, OpenAsks
from sglang_dcp.ledger.promise_turns import PromiseTurns
from sglang_dcp.ledger.retained import RetainedTable
from sglang_dcp.ledger.room import Room
from sglang_dcp.policy.growth import Order, choose_victim, may_grow_on, next_tail
from sglang_dcp.policy.split_limits import Split, SplitLimits

MOST_REFUSED = 8
"""Asks of a kind that a step looks at in vain before it leaves the others for the next step."""


@dataclass(frozen=True, slots=True)
class GrantedSegment:
    rank: int
    first_index: int
    num_pages: int


@dataclass(frozen=True, slots=True)
class Grant:
    """The pages of a request from the first segment's index on; those before it, num_kept, are the first of the retained sequence
    `previous` (0: of none), which it takes over, or borrows."""

    home: int
    handle: int
    segments: tuple[GrantedSegment, ...]
    previous: int = 0
    num_kept: int = 0
    borrows: bool = False


@dataclass(frozen=True, slots=True)
class Decision:
    """Outcome of one step. New local requests leave `promised[r]` pages of instance r free, and some to growth; it may have fewer now."""

    grants: tuple[Grant, ...]
    promised: tuple[int, ...]
    victims: tuple[Key, ...]
    evicted: tuple[Eviction, ...] = ()


class ReservationTable:
    """Open asks of all homes. Fed with the same messages in the same order everywhere.

    retained: sequences that asks may take over or get evicted. num_looked_at: asks that the last decision looked at.
    """

    def __init__(self, limits: SplitLimits) -> None:
        self.limits = limits
        self.num_instances = limits.layout.num_instances
        self.num_looked_at = 0
        self._admissions: OpenAsks[AskAdmission] = OpenAsks()
        self._growths: OpenAsks[AskGrowth] = OpenAsks()
        self._stuck_growths: OpenAsks[AskGrowth] = OpenAsks()
        self._stuck_pages = [0] * self.num_instances
        self._turns = PromiseTurns()
        self.retained = RetainedTable(self.num_instances)
        self._asks_of_retained: dict[Key, list[Key]] = {}
        self._digest = OpenDigest()

    def __len__(self) -> int:
        return len(self._admissions) + len(self._growths)

    @property
    def is_empty(self) -> bool:
        """Nothing is open and nothing retained: there is nothing to decide about."""
        return not (self._admissions.by_key or self._growths.by_key or self.retained.sequences)

    @property
    def digest(self) -> int:
        """Of the open asks and retained sequences: the same on all instances, or they have gone apart."""
        return self._digest.value + self.retained.digest & MASK

    def ask(self, home: int, ask: AskAdmission | AskGrowth) -> None:
        """Opens an ask, or replaces the open one of the same handle. ValueError for a split that not even an empty cluster can grant."""
        if isinstance(ask, AskAdmission):
            if not self.limits.fits(home, ask.whole):
                raise ValueError(f"home {home}, handle {ask.handle}: the split {ask.whole} can never be granted within {self.limits}")
            self._close(self._admissions, (home, ask.handle))
            self._admissions.put(home, ask)
            if ask.previous:
                if (home, ask.previous) not in self.retained:
                    raise ValueError(f"home {home}, handle {ask.handle}: handle {ask.previous} is not retained")
                self.retained.name((home, ask.previous))
                self._asks_of_retained.setdefault((home, ask.previous), []).append((home, ask.handle))
        else:
            self._close(self._growths, (home, ask.handle))
            self._growths.put(home, ask)
            if ask.stuck:
                self._stuck_growths.put(home, ask)
                self._promise_growth(home, ask, 1)
        self._digest.put((ask.KIND, home, ask.handle), (ask.KIND, home, *ask.words()))

    def withdraw(self, home: int, handle: int) -> None:
        self._close(self._admissions, (home, handle))
        self._close(self._growths, (home, handle))

    def _close(self, asks: OpenAsks[Ask], key: Key) -> None:
        ask = asks.take(key)
        if ask is None:
            return
        self._digest.take((ask.KIND, *key))
        if isinstance(ask, AskAdmission) and ask.previous:
            previous = key[0], ask.previous
            self.retained.unname(previous)
            self._asks_of_retained[previous].remove(key)
            if not self._asks_of_retained[previous]:
                del self._asks_of_retained[previous]
        if isinstance(ask, AskGrowth) and self._stuck_growths.take(key) is not None:
            self._promise_growth(key[0], ask, -1)

    def _promise_growth(self, home: int, ask: AskGrowth, pages: int) -> None:
        for rank in may_grow_on(home, ask.shards, ask.page_index + 1, self.limits):
            self._stuck_pages[rank] += pages

    def decide(
        self,
        free: Sequence[int],
        guest_room: Sequence[int],
        anybody_runs: bool,
        levels: Sequence[float] | None = None,
        wanted: Sequence[int] = (),
        most_retained: int | None = None,
    ) -> Decision:
        """Grants of this step; granted asks leave the table.

        free[r]: pages that instance r can give now (evictable cache included). guest_room[r]: pages that new guests may still take there.
        anybody_runs: some instance has tokens in this step's batch. levels[r]: predicted level, where growth may choose. wanted[r]: free
        pages that its local requests need. most_retained: pages that one pool may retain, None for any.
        """
        self.num_looked_at = 0
        room = Room(self.limits, free, guest_room, self.retained.pages, self.retained.evictable)
        evictions = Evictions(self.retained, room)
        grants, stuck = self._decide_growth(evictions, levels or [0.0] * self.num_instances)
        promised = list(self._stuck_pages)
        # Growth that was not looked at comes before admission too.
        room.set_aside(promised)
        grants += self._decide_admission(evictions, promised)
        evictions.for_locals(wanted, promised)
        if most_retained is not None:
            evictions.keep_shares(most_retained)
        self._close_evicted(evictions.chosen)
        victim = choose_victim(stuck, somebody_gets_on=anybody_runs or bool(grants))
        return Decision(tuple(grants), tuple(promised), () if victim is None else (victim[1:],), tuple(evictions.chosen))

    def _close_evicted(self, evicted: Sequence[Eviction]) -> None:
        """Asks for what is gone are over: their homes know, and ask for everything."""
        for eviction in evicted:
            for key in tuple(self._asks_of_retained.get(eviction[:2], ())):
                self._close(self._admissions, key)

    def _decide_growth(self, evictions: Evictions, levels: Sequence[float]) -> tuple[list[Grant], list[Order]]:
        """Grants, and the stuck asks that were looked at in vain: the youngest of all is among them, if it is stuck for good."""
        grants: list[Grant] = []
        stuck: list[Order] = []
        num_refused = 0
        room = evictions.room
        for order, ask in self._growths.in_turn():
            rank = self._next_tail(order[1], ask, evictions, levels)
            if rank is not None:
                room.take(order[1], ((rank, 1),))
                grants.append(_grant(order[1:], ((rank, 1),), ask.page_index))
                self._close(self._growths, order[1:])
                continue
            num_refused += 1
            if ask.stuck:
                stuck.append(order)
            if num_refused > MOST_REFUSED:
                break
        youngest = self._stuck_growths.youngest()
        if youngest is not None and youngest[0] not in stuck and self._next_tail(youngest[0][1], youngest[1], evictions, levels) is None:
            stuck.append(youngest[0])
        # The youngest overall yields, or nobody: one that was not looked at may get its page in the next step.
        return grants, stuck if youngest is not None and youngest[0] in stuck else []

    def _next_tail(self, home: int, ask: AskGrowth, evictions: Evictions, levels: Sequence[float]) -> int | None:
        """Where there is room, or is now that a retained sequence was evicted for it."""
        self.num_looked_at += 1
        room, num_pages = evictions.room, ask.page_index + 1

        def tail(free: Sequence[int]) -> int | None:
            return next_tail(home, ask.shards, num_pages, free, limits=self.limits, guest_room=room.guests, levels=levels)

        rank = tail(room.free)
        if rank is None and len(self.retained):
            rank = tail(evictions.free_with_all())
            if rank is not None:
                evictions.make_room({rank: 1}, "growth")
        return rank

    def _decide_admission(self, evictions: Evictions, promised: list[int]) -> list[Grant]:
        """Grants; adds to `promised` what the first waiting ask needs."""
        grants: list[Grant] = []
        num_refused = 0
        room = evictions.room
        for order, ask in self._admissions.in_turn():
            if ask.previous and (order[1], ask.previous) not in self.retained:
                continue  # evicted in this step for one before it
            self.num_looked_at += 1
            split = evictions.for_admission(order[1], ask, leaves=not self._turns.are_long(order))
            if split is not None:
                grants.append(self._grant_admission(order[1:], ask, split))
                room.take(order[1], split, ask.taken)
                if ask.previous:
                    room.refresh()
                continue
            if not num_refused and self._turns.is_promised(order):
                for rank, pages in ask.segments:
                    promised[rank] += pages
                room.take(order[1], ask.segments, ask.taken)
            num_refused += 1
            if num_refused > MOST_REFUSED:
                break
        return grants

    def _grant_admission(self, key: tuple[int, ...], ask: AskAdmission, split: Split) -> Grant:
        self._close(self._admissions, (key[0], ask.handle))
        if ask.previous:
            begin = self.retained.borrow if ask.borrows else self.retained.take_over
            begin((key[0], ask.previous), (key[0], ask.handle))
        return _grant(key, split, ask.num_kept, ask.previous, ask.borrows)


def _grant(key: tuple[int, ...], split: Split, first_index: int, previous: int = 0, borrows: bool = False) -> Grant:
    segments, num_kept = [], first_index if previous else 0
    for rank, pages in split:
        segments.append(GrantedSegment(rank, first_index, pages))
        first_index += pages
    return Grant(key[0], key[1], tuple(segments), previous, num_kept, borrows)
