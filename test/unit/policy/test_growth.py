"""The next tail page goes home, to an existing shard, to a new one, or nowhere; the youngest yields."""

from __future__ import annotations

import pytest

from sglang_dcp.policy.cost_model import load_cost_model
from sglang_dcp.policy.growth import choose_victim, may_grow_on, next_tail, predicted_level
from sglang_dcp.policy.split_limits import Layout, SplitLimits

COST = load_cost_model("cpu", 4)
POOL_PAGES, PAGE = 64, 16


def limits_of(max_degree: int = 4, node_size: int = 4, guest_pages: int = POOL_PAGES, *, crosses: bool = False) -> SplitLimits:
    return SplitLimits(POOL_PAGES, max_degree, guest_pages, Layout(4, node_size, crosses))


def grow(
    room: list[int], shards: tuple[int, ...], node_size: int = 4, max_degree: int = 4, num_pages: int = 8, *, crosses: bool = False
) -> int | None:
    levels = [predicted_level(COST, (POOL_PAGES - pages) * PAGE, 0) for pages in room]
    limits = limits_of(max_degree, node_size, crosses=crosses)
    tail = next_tail(0, shards, num_pages, room, limits=limits, guest_room=[POOL_PAGES] * 4, levels=levels)
    assert tail is None or tail in may_grow_on(0, shards, num_pages, limits)
    return tail


def test_order_of_preference():
    assert grow([1, 50, 50, 0], (1, 0)) == 0
    assert grow([0, 2, 50, 0], (1, 0)) == 1
    assert grow([0, 2, 4, 50], (1, 2, 0)) == 2
    assert grow([0, 0, 10, 50], (1, 0)) == 3
    assert grow([0, 0, 0, 0], (1, 0)) is None


def test_a_new_shard_is_the_one_of_the_lowest_level():
    """Rank 3 has most room and the highest level: many requests attend there."""
    levels = [predicted_level(COST, 0, requests) for requests in (0, 5, 1, 9)]
    assert next_tail(0, (0,), 8, [0, 4, 4, 40], limits=limits_of(), guest_room=[9] * 4, levels=levels) == 2


@pytest.mark.parametrize(
    ("shards", "max_degree", "room", "expected"),
    [
        ((0, 2), 4, [1, 9, 9, 9], 0),
        ((2,), 4, [1, 9, 9, 9], 0),
        ((2,), 1, [1, 9, 3, 9], 2),
        ((1, 2), 4, [0, 2, 3, 9], 2),
        ((1, 2), 4, [0, 3, 3, 9], 1),
        ((1, 2), 4, [0, 0, 0, 9], 3),
        ((1,), 4, [0, 0, 5, 5], 2),
        ((1, 2), 2, [9, 0, 0, 9], None),
        ((1,), 4, [0, 0, 0, 0], None),
        ((1, 1, 1), 2, [0, 0, 4, 0], 2),
    ],
)
def test_home_then_known_shards_then_new_ones(shards, max_degree, room, expected):
    assert grow(room, shards, max_degree=max_degree) == expected


def test_a_new_shard_is_in_the_home_s_node():
    """Where shards may cross, one elsewhere only once the node could not hold the request."""
    for crosses in (False, True):
        assert grow([0, 10, 500, 500], (0,), node_size=2, crosses=crosses) == 1
        assert grow([0, 0, 500, 500], (0,), node_size=2, crosses=crosses) is None
        assert grow([0, 0, 500, 500], (0, 1), node_size=2, num_pages=2 * POOL_PAGES + 1, crosses=crosses) == (2 if crosses else None)


def test_a_new_shard_has_room_for_guests():
    for room, expected in (([0, 0, 1, 0], 2), ([5, 0, 0, 0], None)):
        assert next_tail(0, (0,), 8, [0, 9, 9, 9], limits=limits_of(), guest_room=room, levels=[0.0] * 4) == expected
    assert may_grow_on(0, (2,), 8, limits_of(guest_pages=0)) == [0, 2]


def test_the_degree_is_bounded():
    assert grow([0, 500, 500, 500], (0,), max_degree=1) is None
    assert grow([500, 0, 0, 0], (1,), max_degree=1) is None, "the home would be a second shard"


def test_the_youngest_yields_once_two_are_stuck_or_nobody_gets_on():
    orders = [(5, 3, 0), (9, 0, 1), (9, 0, 0), (2, 3, 0)]
    assert choose_victim(orders, somebody_gets_on=True) == (9, 0, 1)
    assert choose_victim(orders[:1], somebody_gets_on=True) is None
    assert choose_victim(orders[:1], somebody_gets_on=False) == (5, 3, 0)
    assert choose_victim([], somebody_gets_on=False) is None
