"""Who gets pages, and in what order. Every instance keeps this table and computes the same grants from the same words.

Rules, and why:
- Growth before admission, each in the total order (born, home, handle). A running request is never held up by one that has not started,
  so running requests always finish and waiting ones always start: no deadlock.
- Admission is all or nothing. While the first waiting ask does not fit, what its split needs is promised to it, pages that are still
  taken included: nobody behind it (nor a local request, see `Decision.promised`) may take them when they become free, so short requests
  cannot starve a long one. It holds them up for half of its wait at most (promise_turns.py), so a long one cannot stop the short ones.
  A stuck growth is promised one page wherever it may grow.
- No split leaves the limits (policy/split_limits.py): every open ask could be granted on an empty cluster, so no promise is for ever.
- Where growth goes, and who yields, is the policy's rule (policy/growth.py), the same that the simulator runs.
- A step looks at the first ask and at no more than MOST_REFUSED of those that have to wait, in turn: its work is bounded whatever waits.
  The first ask is looked at in every step and keeps its promise, so everybody's turn comes. (What is granted is work of its own.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sglang_dcp.ledger.digest import OpenDigest
from sglang_dcp.ledger.messages import AskAdmission, AskGrowth
from sglang_dcp.ledger.open_asks import Ask, Key, OpenAsks
from sglang_dcp.ledger.promise_turns import PromiseTurns
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
    """Open asks of all homes. Fed with the same messages in the same order everywhere.

    num_looked_at: asks that the last decision looked at.
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
        self._digest = OpenDigest()

    def __len__(self) -> int:
        return len(self._admissions) + len(self._growths)

    @property
    def digest(self) -> int:
        """Of the open asks: the same on all instances, or they have gone apart."""
        return self._digest.value

    def ask(self, home: int, ask: AskAdmission | AskGrowth) -> None:
        """Opens an ask, or replaces the open one of the same handle. ValueError for a split that not even an empty cluster can grant."""
        if isinstance(ask, AskAdmission):
            if not self.limits.fits(home, ask.segments):
                raise ValueError(f"home {home}, handle {ask.handle}: the split {ask.segments} can never be granted within {self.limits}")
            self._close(self._admissions, (home, ask.handle))
            self._admissions.put(home, ask)
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
        if isinstance(ask, AskGrowth) and self._stuck_growths.take(key) is not None:
            self._promise_growth(key[0], ask, -1)

    def _promise_growth(self, home: int, ask: AskGrowth, pages: int) -> None:
        for rank in may_grow_on(home, ask.shards, ask.page_index + 1, self.limits):
            self._stuck_pages[rank] += pages

    def decide(self, free: Sequence[int], guest_room: Sequence[int], anybody_runs: bool, levels: Sequence[float] | None = None) -> Decision:
        """Grants of this step; granted asks leave the table.

        free[r]: pages that instance r can give now (evictable cache included). guest_room[r]: pages that new guests may still take there.
        anybody_runs: some instance has tokens in this step's batch. levels[r]: predicted level, where growth may choose.
        """
        self.num_looked_at = 0
        room = Room(self.limits, free, guest_room)
        grants, stuck = self._decide_growth(room, levels or [0.0] * self.num_instances)
        promised = list(self._stuck_pages)
        # Growth that was not looked at comes before admission too.
        room.set_aside(promised)
        grants += self._decide_admission(room, promised)
        victim = choose_victim(stuck, somebody_gets_on=anybody_runs or bool(grants))
        return Decision(tuple(grants), tuple(promised), () if victim is None else (victim[1:],))

    def _decide_growth(self, room: Room, levels: Sequence[float]) -> tuple[list[Grant], list[Order]]:
        """Grants, and the stuck asks that were looked at in vain: the youngest of all is among them, if it is stuck for good."""
        grants: list[Grant] = []
        stuck: list[Order] = []
        num_refused = 0
        for order, ask in self._growths.in_turn():
            rank = self._next_tail(order[1], ask, room, levels)
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
        if youngest is not None and youngest[0] not in stuck and self._next_tail(youngest[0][1], youngest[1], room, levels) is None:
            stuck.append(youngest[0])
        # The youngest overall yields, or nobody: one that was not looked at may get its page in the next step.
        return grants, stuck if youngest is not None and youngest[0] in stuck else []

    def _next_tail(self, home: int, ask: AskGrowth, room: Room, levels: Sequence[float]) -> int | None:
        self.num_looked_at += 1
        return next_tail(home, ask.shards, ask.page_index + 1, room.free, limits=self.limits, guest_room=room.guests, levels=levels)

    def _decide_admission(self, room: Room, promised: list[int]) -> list[Grant]:
        """Grants; adds to `promised` what the first waiting ask needs."""
        grants: list[Grant] = []
        num_refused = 0
        for order, ask in self._admissions.in_turn():
            self.num_looked_at += 1
            split = room.split(order[1], ask)
            if split is not None:
                room.take(order[1], split)
                grants.append(_grant(order[1:], split, 0))
                self._close(self._admissions, order[1:])
                continue
            if not num_refused and self._turns.is_promised(order):
                for rank, pages in ask.segments:
                    promised[rank] += pages
                room.take(order[1], ask.segments)
            num_refused += 1
            if num_refused > MOST_REFUSED:
                break
        return grants


def _grant(key: tuple[int, ...], split: Split, first_index: int) -> Grant:
    segments = []
    for rank, pages in split:
        segments.append(GrantedSegment(rank, first_index, pages))
        first_index += pages
    return Grant(key[0], key[1], tuple(segments))
