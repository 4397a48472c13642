"""Placement: conservation, room, pins, degree 1 where it belongs, both balances, capacity errors by name."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sglang_dcp.policy.cost_model import CostModel, load_cost_model
from sglang_dcp.policy.placement import POLICY_NAMES, make_policy
from sglang_dcp.policy.split_limits import Layout, SplitRule
from sglang_dcp.policy.types import CapacityError, InstanceLoad, Placement, PlacementPolicy, PlacementRequest

PAGE = 16
POOL = 1024


def policy_of(name: str, num_instances: int = 4, model: str = "cpu", **changes) -> PlacementPolicy:
    options = {"degree": 2 if name == "fixed" else None, "max_degree": num_instances, "max_guest_fraction": 1.0, **changes}
    return make_policy(name, num_instances=num_instances, page_size=PAGE, cost_model=load_cost_model(model, num_instances), **options)


def loads_of(kv_tokens: list[int], batches: list[int] | None = None, pool: int = POOL, per_node: int = 8) -> list[InstanceLoad]:
    batches = batches or [0] * len(kv_tokens)
    return [
        InstanceLoad(rank=i, node=i // per_node, kv_tokens=kv, kv_capacity=pool, home_requests=batch)
        for i, (kv, batch) in enumerate(zip(kv_tokens, batches, strict=True))
    ]


def request_of(prompt: int, new: int = 16, **pins) -> PlacementRequest:
    return PlacementRequest(prompt_tokens=prompt, expected_new_tokens=new, max_new_tokens=new, **pins)


def check(placement: Placement, request: PlacementRequest, num_instances: int) -> None:
    """What every placement owes, whoever made it."""
    assert sum(placement.shard_tokens) == request.prompt_tokens
    assert all(tokens >= 1 for tokens in placement.shard_tokens)
    assert all(tokens % PAGE == 0 for tokens in placement.shard_tokens[:-1])
    assert all(0 <= rank < num_instances for rank in (placement.home, *placement.shards))
    assert placement.tail == placement.home
    if request.degree is not None:
        assert placement.degree == request.degree
    if request.home is not None:
        assert placement.home == request.home


@settings(max_examples=300, deadline=None)
@given(
    name=st.sampled_from(POLICY_NAMES),
    kv=st.lists(st.integers(0, 1200), min_size=4, max_size=4),
    batches=st.lists(st.integers(0, 9), min_size=4, max_size=4),
    prompt=st.integers(1, 5000),
    degree=st.none() | st.integers(-1, 6),
    home=st.none() | st.integers(-1, 5),
)
def test_any_request_is_placed_whole_or_refused_by_name(name, kv, batches, prompt, degree, home):
    request = request_of(prompt, degree=degree, home=home)
    policy, loads = policy_of(name), loads_of(kv, batches)
    before = [replace(load) for load in loads]
    try:
        placement = policy.place(request, loads, PAGE)
    except ValueError as error:
        assert any(word in str(error) for word in ("dyncp", "--dyncp", "tokens"))
        return
    check(placement, request, 4)
    assert all(tokens <= POOL for tokens in placement.shard_tokens)
    assert loads == before, "a policy changed the loads"
    assert policy_of(name).place(request, loads, PAGE) == placement, "not deterministic"


@pytest.mark.parametrize("degree", [1, 2, 3, 4])
@pytest.mark.parametrize("home", [0, 3])
def test_pins_are_honoured_on_every_load(degree: int, home: int):
    for kv in ([0] * 4, [900, 0, 0, 900], [1024] * 4):
        request = request_of(300, degree=degree, home=home)
        check(policy_of("dual-balance").place(request, loads_of(kv), PAGE), request, 4)


@pytest.mark.parametrize(
    ("prompt", "pins", "message"),
    [
        (20, {"degree": 3}, "20 tokens has 2 pages"),
        (100, {"degree": 5}, r"degree = 5 is outside 1\.\.4"),
        (100, {"home": 4}, r"home = 4 is outside 0\.\.3"),
        (1500, {"degree": 1}, "1500"),
        (4090, {}, "4106 tokens exceed 4096"),
    ],
)
def test_impossible_requests_name_value_and_limit(prompt: int, pins: dict, message: str):
    with pytest.raises(ValueError, match=message):
        policy_of("dual-balance").place(request_of(prompt, **pins), loads_of([0] * 4), PAGE)


def test_beyond_the_cluster_is_a_capacity_error_for_every_policy():
    for name in POLICY_NAMES:
        with pytest.raises(CapacityError):
            policy_of(name).place(request_of(5000), loads_of([0] * 4), PAGE)


def test_local_refuses_what_one_pool_cannot_hold_and_ours_takes_it():
    request = request_of(2000)
    with pytest.raises(CapacityError, match="never splits"):
        policy_of("local").place(request, loads_of([0] * 4), PAGE)
    assert policy_of("dual-balance").place(request, loads_of([0] * 4), PAGE).degree >= 2


def test_a_placement_that_fits_now_is_preferred_to_one_that_waits():
    """Three pools nearly full: a prompt larger than any one of them goes where all of its pages have room at once."""
    loads = loads_of([700, 900, 512, 700])
    placement = policy_of("dual-balance").place(request_of(640), loads, PAGE)
    pages = [-(-tokens // PAGE) for tokens in placement.shard_tokens]
    assert all(pages[i] <= loads[rank].free_tokens // PAGE for i, rank in enumerate(placement.shards))
    assert loads[placement.tail].free_tokens // PAGE > pages[-1], "no headroom on the tail"


def test_without_room_the_request_is_spread_over_the_most_free_pools():
    placement = policy_of("dual-balance").place(request_of(1600), loads_of([900, 700, 800, 1024]), PAGE)
    assert placement.degree == 4
    by_rank = dict(zip(placement.shards, placement.shard_tokens, strict=True))
    assert by_rank[1] > by_rank[3], "the freest pool should take more than the full one"


def test_the_constants_of_a_cpu_spread_a_prompt_that_one_pool_could_hold():
    """They are not measured; the operator's guide says so. Tests with small pools rely on it."""
    policy, idle = policy_of("dual-balance"), loads_of([0] * 4)
    assert [policy.place(request_of(prompt), idle, PAGE).degree for prompt in (64, 900)] == [1, 4]


def test_a_guest_limit_of_zero_means_degree_one():
    policy = policy_of("dual-balance", max_guest_fraction=0.0)
    assert policy.place(request_of(600), loads_of([0] * 4), PAGE).is_local
    with pytest.raises(CapacityError, match="--dyncp-max-guest-fraction"):
        policy.place(request_of(1500), loads_of([0] * 4), PAGE)


def test_long_prompts_stay_inside_the_node_and_short_ones_whole():
    loads = loads_of([50_000] * 32, [20] * 32, pool=1_000_000)
    policy = policy_of("dual-balance", 32, "deepseek-v3.h200")
    placement = policy.place(request_of(400_000), loads, PAGE)
    assert placement.degree > 1
    assert len({loads[rank].node for rank in placement.shards}) == 1
    assert policy.place(request_of(2_000), loads, PAGE).is_local


@pytest.mark.parametrize("pins", [{}, {"home": 5}, {"degree": 4}])
def test_a_prompt_beyond_a_node_is_refused_with_the_node_s_size(pins):
    loads = loads_of([0] * 16, pool=POOL, per_node=4)
    placement = policy_of("dual-balance", 16).place(request_of(4_000, **pins), loads, PAGE)
    assert len({loads[rank].node for rank in placement.shards}) == 1
    with pytest.raises(CapacityError, match=r"exceed 4096, the KV capacity of 4 of the 4 instances of a node .*--dyncp-node-size"):
        policy_of("dual-balance", 16).place(request_of(6_000, **pins), loads, PAGE)
    for members in (range(4), range(8, 12)):  # a full node changes nothing about where it may lie
        for rank in members:
            loads[rank].kv_tokens = POOL
    assert len({loads[rank].node for rank in policy_of("dual-balance", 16).place(request_of(4_000, **pins), loads, PAGE).shards}) == 1


def test_a_prompt_beyond_a_node_crosses_nodes_where_it_may():
    loads = loads_of([0] * 16, pool=POOL, per_node=4)
    policy = policy_of("dual-balance", 16, crosses_nodes=True)
    placement = policy.place(request_of(6_000), loads, PAGE)
    assert len({loads[rank].node for rank in placement.shards}) > 1
    assert len({loads[rank].node for rank in policy.place(request_of(4_000), loads, PAGE).shards}) == 1


@pytest.mark.parametrize("per_node", [8, 12])
def test_seventy_two_instances_are_placed_node_by_node(per_node):
    """Whole nodes are filled one after the other; the next long prompt always lies in one that has room."""
    loads, policy = loads_of([0] * 72, pool=POOL, per_node=per_node), policy_of("dual-balance", 72)
    prompt = POOL * (per_node - 1)
    used = []
    for _ in range(72 // per_node):
        placement = policy.place(request_of(prompt), loads, PAGE)
        (node,) = {loads[rank].node for rank in placement.shards}
        used.append(node)
        for rank, tokens in zip(placement.shards, placement.shard_tokens, strict=True):
            loads[rank].kv_tokens += tokens
    assert sorted(used) == list(range(72 // per_node))
    with pytest.raises(CapacityError, match=f"{per_node} of the {per_node} instances of a node"):
        policy.place(request_of(POOL * per_node), loads, PAGE)


@pytest.mark.parametrize("degree", [3, 5])
def test_a_pinned_degree_beyond_a_node_is_refused(degree):
    loads = loads_of([0] * 8, per_node=2)
    for name in ("dual-balance", "length-buckets", "fixed"):
        with pytest.raises(ValueError, match=f"{degree}.*(node|--dyncp-max-degree)"):
            policy_of(name, 8).place(request_of(600, degree=degree), loads, PAGE)


def test_max_degree_bounds_every_split():
    policy = policy_of("dual-balance", max_degree=2)
    assert policy.place(request_of(1500), loads_of([0] * 4), PAGE).degree == 2
    with pytest.raises(CapacityError, match="--dyncp-max-degree"):
        policy.place(request_of(3000), loads_of([0] * 4), PAGE)


@example("dual-balance", [0, 0, 0, 513], 0, 481, 2, 0.0, 2, None, 3, False)  # a full home, and guests have no room anywhere
@settings(max_examples=300, deadline=None)
@given(
    name=st.sampled_from(POLICY_NAMES),
    kv=st.lists(st.integers(0, 1200), min_size=4, max_size=4),
    guests=st.integers(0, 900),
    prompt=st.integers(1, 4000),
    max_degree=st.integers(1, 4),
    fraction=st.sampled_from([0.0, 0.25, 0.6, 1.0]),
    per_node=st.sampled_from([1, 2, 4]),
    degree=st.none() | st.integers(1, 4),
    home=st.none() | st.integers(0, 3),
    crosses=st.booleans(),
)
def test_no_policy_leaves_the_limits_of_a_split(name, kv, guests, prompt, max_degree, fraction, per_node, degree, home, crosses):
    """What is placed outside them no grant could give, and the request would wait for ever."""
    layout, request = Layout(4, per_node, crosses), request_of(prompt, degree=degree, home=home)
    limits = SplitRule(1 if name == "local" else max_degree, fraction).limits(POOL // PAGE, layout)
    changes = {"degree": min(2, max_degree)} if name == "fixed" else {}
    changes |= {"max_degree": max_degree, "max_guest_fraction": fraction, "crosses_nodes": crosses}
    policy, loads = policy_of(name, **changes), loads_of(kv, per_node=per_node)
    for load in loads:
        load.guest_tokens = min(guests, load.kv_tokens)
    try:
        placement = policy.place(request, loads, PAGE)
    except ValueError as error:
        assert "--dyncp" in str(error) or "dyncp." in str(error) or "policy" in str(error)
        assert degree is not None or name != "dual-balance" or prompt + 16 > limits.reach_pages * PAGE - 2 * PAGE
        return
    split = [(rank, -(-tokens // PAGE)) for rank, tokens in zip(placement.shards, placement.shard_tokens, strict=True)]
    assert limits.fits(placement.home, split), split
    with_tail = (*split[:-1], (split[-1][0], split[-1][1] + 1))
    assert limits.fits(placement.home, with_tail), with_tail
    if name in ("dual-balance", "length-buckets") and degree is None:
        assert set(placement.shards) <= set(limits.scope(placement.home, sum(pages for _, pages in with_tail)))


@pytest.mark.parametrize("name", ["fixed", "dual-balance", "length-buckets"])
def test_a_pin_that_guests_may_never_take_is_refused_by_name(name):
    policy = policy_of(name, max_guest_fraction=0.0)
    with pytest.raises(CapacityError, match="--dyncp-max-guest-fraction"):
        policy.place(request_of(600, degree=2), loads_of([0] * 4), PAGE)


def test_large_clusters_are_placed_through_the_window_and_fall_back_to_all():
    full = loads_of([POOL] * 512)
    full[500].kv_tokens = 0
    assert policy_of("dual-balance", 512).place(request_of(100), full, PAGE).home == 500


@pytest.mark.parametrize("arguments", [{"max_degree": 9}, {"max_guest_fraction": 1.5}, {"degree": 2}])
def test_settings_that_cannot_work_name_their_flag(arguments: dict):
    with pytest.raises(ValueError, match="--dyncp-"):
        policy_of("dual-balance", **arguments)
    with pytest.raises(ValueError, match="--dyncp-policy"):
        policy_of("round-robin")


def test_short_requests_keep_degree_one_and_both_axes_stay_balanced():
    """A churning mix on four small pools; running requests leave in random order."""
    draw = random.Random(3)
    policy, loads = policy_of("dual-balance"), loads_of([0] * 4)
    running: list[Placement] = []
    short, ratios = [], []
    for _ in range(3000):
        prompt = draw.randint(300, 1200) if draw.random() < 0.05 else draw.randint(16, 100)
        while running and sum(load.kv_tokens for load in loads) > 0.6 * 4 * POOL:
            _apply(loads, running.pop(draw.randrange(len(running))), -1)
        placement = policy.place(request_of(prompt), loads, PAGE)
        _apply(loads, placement, 1)
        running.append(placement)
        short += [placement.degree == 1] if prompt * 10 <= POOL else []
        kv, batch = [load.kv_tokens for load in loads], [load.home_requests for load in loads]
        ratios.append((4 * max(kv) / sum(kv), 4 * max(batch) / sum(batch)))
    assert sum(short) >= 0.95 * len(short)
    steady = ratios[200:]
    assert sum(kv for kv, _ in steady) / len(steady) <= 1.2
    assert sum(batch for _, batch in steady) / len(steady) <= 1.25


def _apply(loads: list[InstanceLoad], placement: Placement, sign: int) -> None:
    for rank, tokens in zip(placement.shards, placement.shard_tokens, strict=True):
        loads[rank].kv_tokens += sign * -(-tokens // PAGE) * PAGE
        if rank != placement.home:
            loads[rank].guest_tokens += sign * -(-tokens // PAGE) * PAGE
    loads[placement.home].home_requests += sign


@settings(max_examples=150, deadline=None)
@given(
    constant=st.sampled_from([name for name in CostModel.__dataclass_fields__ if "_us" in name]),
    factor=st.sampled_from([0.0, 1e-6, 1e6]),
    kv=st.lists(st.integers(0, 1024), min_size=4, max_size=4),
    batches=st.lists(st.integers(0, 500), min_size=4, max_size=4),
    prompt=st.integers(1, 3000),
)
def test_no_constant_makes_placement_fail(constant, factor, kv, batches, prompt):
    """A calibrated file may hold a constant of zero or an absurd one; the router must not fall over it."""
    for model in ("cpu", "deepseek-v3.h200"):
        cost = load_cost_model(model, 4).scaled(constant, factor)
        policy = make_policy(
            "dual-balance", num_instances=4, page_size=PAGE, cost_model=cost, degree=None, max_degree=4, max_guest_fraction=1.0
        )
        request = request_of(prompt)
        check(policy.place(request, loads_of(kv, batches), PAGE), request, 4)
