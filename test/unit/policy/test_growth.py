"""The next tail page goes home, to an existing shard, to a new one, or nowhere; the youngest yields."""

from __future__ import annotations

from sglang_dcp.policy.cost_model import load_cost_model
from sglang_dcp.policy.growth import RequestOrder, choose_victim, next_tail
from sglang_dcp.policy.types import InstanceLoad

PAGE = 16
COST = load_cost_model("cpu", 4)


def loads_of(free: list[int], nodes: list[int] | None = None) -> list[InstanceLoad]:
    nodes = nodes or [0] * len(free)
    return [InstanceLoad(i, nodes[i], 1024 - tokens, 1024) for i, tokens in enumerate(free)]


def grow(free: list[int], shards: tuple[int, ...], nodes: list[int] | None = None, max_degree: int = 4) -> int | None:
    return next_tail(0, shards, loads_of(free, nodes), PAGE, COST, max_degree=max_degree)


def test_order_of_preference():
    assert grow([16, 500, 500, 0], (1, 0)) == 0
    assert grow([15, 32, 500, 0], (1, 0)) == 1
    assert grow([0, 32, 64, 500], (1, 2, 0)) == 2
    assert grow([0, 0, 100, 500], (1, 0)) == 3
    assert grow([0, 15, 0, 8], (1, 0)) is None


def test_a_new_shard_prefers_the_home_s_node_and_the_degree_is_bounded():
    assert grow([0, 500, 100, 0], (0,), nodes=[0, 1, 0, 1]) == 2
    assert grow([0, 500, 500, 500], (0,), max_degree=1) is None
    assert grow([500, 0, 0, 0], (1,), max_degree=1) is None, "the home would be a second shard"


def test_the_youngest_yields_by_the_total_order():
    orders = [RequestOrder(5, 3), RequestOrder(9, 0, 1), RequestOrder(9, 0, 0), RequestOrder(2, 3)]
    assert choose_victim(orders) == RequestOrder(9, 0, 1)
    assert choose_victim([]) is None
