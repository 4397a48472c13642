"""Pages that admission leaves to the growth of those that run: who is given less, and who is not."""

from __future__ import annotations

import pytest

from sglang_dcp.config import DynCpConfig
from sglang_dcp.ledger.messages import AskAdmission, AskGrowth
from sglang_dcp.ledger.participant import Participant
from sglang_dcp.ledger.reservations import ReservationTable
from sglang_dcp.policy.split_limits import Layout, SplitLimits
from sglang_dcp.upstream.step.runtime import cluster_of
from testing.protocol.fakes import FakePool

POOL, LEFT = 200, 2
MANY = [10**6] * 2


def table_of(*asks, max_degree=2):
    table = ReservationTable(SplitLimits(POOL, max_degree, POOL, Layout(2, 2)))
    for handle, segments in enumerate(asks, 1):
        table.ask(0, AskAdmission(handle, handle, False, segments))
    return table


def granted(table, *free):
    return [grant.handle for grant in table.decide(free, MANY, True).grants]


@pytest.mark.parametrize("rank", [0, 1])
def test_an_ask_leaves_them_at_home_and_elsewhere(rank):
    assert granted(table_of(((rank, 10),)), 10 + LEFT - 1, 10 + LEFT - 1) == []
    assert granted(table_of(((rank, 10),)), 10 + LEFT, 10 + LEFT) == [1]


def test_a_pool_without_anybody_leaves_none_and_then_some():
    """The first may have it whole. Who comes behind it in the same step finds somebody there."""
    assert granted(table_of(((1, POOL), (0, POOL))), POOL, POOL) == [1]
    assert granted(table_of(((0, POOL - 5),), ((0, 4),)), POOL, POOL) == [1]
    assert granted(table_of(((0, POOL - 5),), ((0, 5 - LEFT),)), POOL, POOL) == [1, 2]


def test_they_are_there_for_growth():
    table = table_of(((0, 1),))
    for handle in range(2, 2 + LEFT):
        table.ask(0, AskGrowth(handle, handle, False, 7, (0,)))
    assert granted(table, LEFT, 0) == [2, 3] and len(table) == 1


def test_where_requests_never_grow_elsewhere_none_are_left():
    limits = SplitLimits(POOL, 1, POOL, Layout(2, 2))
    assert limits.left_to_growth(1) == 0
    assert granted(table_of(((0, 10),), max_degree=1), 10, 0) == [1]


@pytest.mark.parametrize(("free", "retained", "grants"), [(10, 2, [1]), (10, 1, []), (9, 3, [1]), (9, 2, [])])
def test_what_is_retained_may_be_what_is_left(free, retained, grants):
    """Growth can have it too, and nothing is evicted only to stay free."""
    table = table_of(((0, 10),))
    table.retained.put(1, 1, ((0, retained),), 0)
    decision = table.decide([free, 0], MANY, True)
    assert [grant.handle for grant in decision.grants] == grants
    assert len(decision.evicted) == (grants == [1] and free < 10)


def test_what_an_ask_goes_on_from_is_nothing_that_is_left():
    """The sequence is no longer evictable once it is taken over."""
    for free, grants in ((10 + LEFT - 1, []), (10 + LEFT, [1])):
        table = ReservationTable(SplitLimits(POOL, 2, POOL, Layout(2, 2)))
        table.retained.put(0, 9, ((0, 50),), 0)
        table.ask(0, AskAdmission(1, 1, False, ((0, 10),), previous=9, kept=((0, 50),)))
        assert granted(table, free, 0) == grants


@pytest.mark.parametrize(("wanted", "evicts"), [(0, False), (5, False), (6, True)])
def test_nothing_is_evicted_for_nobody(wanted, evicts):
    """The ask is refused: all of the pool would be one page short. What local requests want is there, or is made."""
    table = table_of(((0, 14),))
    table.retained.put(1, 1, ((0, 10),), 0)
    decision = table.decide([5, 0], MANY, True, wanted=[wanted, 0])
    assert not decision.grants and bool(decision.evicted) == evicts


def test_a_pool_with_nothing_but_retained_pages_has_nobody_in_it():
    table = table_of(((0, POOL),))
    table.retained.put(1, 1, ((0, 30),), 0)
    assert granted(table, POOL - 30, 0) == [1]


def test_new_local_requests_leave_them_beside_what_is_promised():
    pool = FakePool(POOL)
    participant = Participant(cluster_of(DynCpConfig().resolve(2), 2, POOL, 16), 0, pool)
    assert participant.withheld_pages == 0
    participant.promised = (7, 0)
    assert participant.withheld_pages == 7 + LEFT, "one that sneaks in before the waiting ask is looked at would hold it up"
    pool.take_pages(2)
    participant.promised = (0, 0)
    assert participant.withheld_pages == LEFT
    participant.table.retained.put(1, 1, ((0, 1),), 0)
    assert participant.withheld_pages == LEFT - 1


def test_one_that_has_waited_long_leaves_what_is_promised_alone():
    pool = FakePool(POOL)
    participant = Participant(cluster_of(DynCpConfig().resolve(2), 2, POOL, 16), 0, pool)
    pool.take_pages(1)
    participant.promised, participant.local_waits_long = (7, 0), True
    assert participant.withheld_pages == 7


@pytest.mark.parametrize(("free", "promised", "room"), [(POOL, 0, POOL), (POOL, 9, POOL - 9 - LEFT), (50, 0, 50 - LEFT), (1, 0, 1 - LEFT)])
def test_who_asks_elsewhere_leaves_them_there(free, promised, room):
    participant = Participant(cluster_of(DynCpConfig().resolve(2), 2, POOL, 16), 0, FakePool(POOL))
    columns = [participant.build_columns(None, pages, 0, 0) for pages in (POOL, free)]
    participant.read_columns(columns)
    participant.promised = (0, promised)
    assert participant.room_for_guests(1) == room
