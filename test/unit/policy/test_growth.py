"""The next tail page goes home, to an existing shard, to a new one, or nowhere; the youngest yields."""

from __future__ import annotations

import pytest

from sglang_dcp.policy.cost_model import load_cost_model
from sglang_dcp.policy.growth import RequestOrder, choose_victim, next_tail, predicted_level

COST = load_cost_model("cpu", 4)
POOL_PAGES, PAGE = 64, 16


def grow(room: list[int], shards: tuple[int, ...], nodes: list[int] | None = None, max_degree: int = 4) -> int | None:
    levels = [predicted_level(COST, (POOL_PAGES - pages) * PAGE, 0) for pages in room]
    return next_tail(0, shards, room, max_degree=max_degree, levels=levels, nodes=nodes or [0] * len(room))


def test_order_of_preference():
    assert grow([1, 50, 50, 0], (1, 0)) == 0
    assert grow([0, 2, 50, 0], (1, 0)) == 1
    assert grow([0, 2, 4, 50], (1, 2, 0)) == 2
    assert grow([0, 0, 10, 50], (1, 0)) == 3
    assert grow([0, 0, 0, 0], (1, 0)) is None


def test_a_new_shard_is_the_one_of_the_lowest_level():
    """Rank 3 has most room and the highest level: many requests attend there."""
    levels = [predicted_level(COST, 0, requests) for requests in (0, 5, 1, 9)]
    assert next_tail(0, (0,), [0, 4, 4, 40], max_degree=4, levels=levels, nodes=[0] * 4) == 2


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


def test_a_new_shard_prefers_the_home_s_node_and_the_degree_is_bounded():
    assert grow([0, 500, 100, 0], (0,), nodes=[0, 1, 0, 1]) == 2
    assert grow([0, 500, 500, 500], (0,), max_degree=1) is None
    assert grow([500, 0, 0, 0], (1,), max_degree=1) is None, "the home would be a second shard"


def test_the_youngest_yields_by_the_total_order():
    orders = [RequestOrder(5, 3), RequestOrder(9, 0, 1), RequestOrder(9, 0, 0), RequestOrder(2, 3)]
    assert choose_victim(orders) == RequestOrder(9, 0, 1)
    assert choose_victim([]) is None
