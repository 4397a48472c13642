"""The baselines behave as the systems they stand for."""

from __future__ import annotations

import pytest

from sglang_dcp.policy.baselines import LENGTH_BUCKETS, FixedDegree, LengthBuckets, Local
from sglang_dcp.policy.cost_model import load_cost_model
from sglang_dcp.policy.split_limits import SplitRule
from sglang_dcp.policy.types import CapacityError, InstanceLoad, PlacementRequest

PAGE = 64
POOL = 1_104_000


def loads_of(kv: list[int], batch: list[int]) -> list[InstanceLoad]:
    return [InstanceLoad(i, i // 8, kv_tokens, POOL, 0, count) for i, (kv_tokens, count) in enumerate(zip(kv, batch, strict=True))]


def place(policy, prompt: int, kv: list[int] | None = None, batch: list[int] | None = None):
    return policy.place(PlacementRequest(prompt, 500, 4096), loads_of(kv or [0] * 32, batch or [0] * 32), PAGE)


def test_local_follows_its_rule():
    kv, batch = [5000] * 32, [3] * 32
    kv[7], batch[9] = 10, 0
    assert place(Local("least-kv"), 100, kv, batch).home == 7
    assert place(Local("least-batch"), 100, kv, batch).home == 9


@pytest.mark.parametrize(
    ("model", "prompt", "degree"),
    [
        ("deepseek-v3", 63_488, 1),
        ("deepseek-v3", 63_489, 5),
        ("deepseek-v3", 210_945, 6),
        ("deepseek-v3", 428_032, 7),
        ("deepseek-v3", 1_000_000, 8),
        ("kimi-k2", 10_240, 1),
        ("kimi-k2", 190_465, 4),
    ],
)
def test_length_buckets_use_the_published_limits(model: str, prompt: int, degree: int):
    policy = LengthBuckets(LENGTH_BUCKETS[model], SplitRule(8))
    placement = place(policy, prompt)
    assert placement.degree == degree
    assert len({rank // 8 for rank in placement.shards}) == 1


def test_length_buckets_raise_the_degree_when_pages_do_not_fit():
    kv = [POOL] * 24 + [POOL - 30_000] * 8
    assert place(LengthBuckets(LENGTH_BUCKETS["deepseek-v3"], SplitRule(8)), 170_000, kv, [5] * 24 + [0] * 8).degree == 6


def test_length_buckets_of_another_model_scale_with_attention_cost():
    policy = LengthBuckets.for_cost_model(load_cost_model("qwen3-235b-a22b.h200", 32), SplitRule(8))
    assert place(policy, 50_000).degree == 1
    assert place(policy, 63_488).degree == 5


def test_fixed_groups_stay_inside_nodes():
    """Nodes of 8: groups of 3 are 0-2, 3-5, 8-10, ... and none is 6-8."""
    loads = loads_of([0] * 24, [5] * 6 + [0] * 18)
    for home in (None, *range(24)):
        request = PlacementRequest(64 * 30, 8, 8, home=home)
        shards = FixedDegree(3, SplitRule(24)).place(request, loads, PAGE).shards
        assert len(shards) == 3 and len({loads[rank].node for rank in shards}) == 1, shards
        assert home is None or home in shards
    with pytest.raises(CapacityError, match="a degree of 12 exceeds the instances of a node.*--dyncp-degree"):
        FixedDegree(12, SplitRule(24)).place(PlacementRequest(64 * 30, 8, 8), loads, PAGE)
    crossing = FixedDegree(12, SplitRule(24, crosses=True)).place(PlacementRequest(64 * 30, 8, 8), loads, PAGE)
    assert len({loads[rank].node for rank in crossing.shards}) == 2


def test_fixed_groups_are_consecutive_and_even():
    placement = place(FixedDegree(4, SplitRule(32)), 64 * 400)
    assert sorted(placement.shards) == [0, 1, 2, 3]
    assert placement.shard_tokens == (6400, 6400, 6400, 6400)
    assert place(FixedDegree(4, SplitRule(32)), 100).degree == 2, "a prompt of two pages has two shards"
