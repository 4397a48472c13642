"""A replay of the policy's own choices finds no difference, and a tampered placement is found where it is."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmark.simulate.cluster import Cluster, SimulatedRequest
from benchmark.simulate.replay import ObservedRequest, replay
from sglang_dcp.policy.cost_model import load_cost_model
from sglang_dcp.policy.placement import make_policy
from sglang_dcp.policy.types import Placement, PlacementRequest

SHAPE = {"num_instances": 4, "instances_per_node": 8, "pool_tokens": 1024, "page_size": 16}


def new_policy():
    cost = load_cost_model("cpu", 4)
    return make_policy("dual-balance", num_instances=4, page_size=16, cost_model=cost, degree=None, max_degree=4, max_guest_fraction=1.0)


def served() -> list[ObservedRequest]:
    """What a router with this policy does for a fixed list of requests, each leaving after five more have come."""
    policy, cluster, observed, present = new_policy(), Cluster(4, 8, 1024, 16), [], []
    for index in range(60):
        prompt = 500 + 13 * index if index % 9 == 4 else 20 + index
        if len(present) == 5:
            cluster.withdraw(present.pop(0))
        placement = policy.place(PlacementRequest(prompt, 16, 16), cluster.loads, 16)
        request = SimulatedRequest(index, float(index), prompt, 16)
        cluster.promise(request, placement)
        present.append(request)
        observed.append(ObservedRequest(float(index), prompt, 16, placement, finish=float(index + 5)))
    return observed


def test_equal_arrivals_give_equal_placements():
    result = replay(served(), new_policy(), **SHAPE)
    assert result.num_requests == 60 and result.differences == () and result.share_equal == 1.0
    assert any(item.placement.degree > 1 for item in served())


def test_a_tampered_placement_is_found():
    observed = served()
    wrong = Placement((observed[7].placement.home + 1) % 4, ((observed[7].placement.home + 1) % 4,), (observed[7].prompt_tokens,))
    observed[7] = replace(observed[7], placement=wrong)
    assert replay(observed, new_policy(), **SHAPE).differences[0][0] == 7
    with pytest.raises(ValueError, match="order"):
        replay(observed[::-1], new_policy(), **SHAPE)
