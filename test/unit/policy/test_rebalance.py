"""Moves of pages: from the hottest instance, inside its node, no more than pays, never the last page."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_dcp.policy.cost_model import load_cost_model
from sglang_dcp.policy.rebalance import MIN_MOVE_PAGES, Held, choose_move

COST = load_cost_model("deepseek-v3.h200", 4)
PAGE = 64
PAGE_US = COST.attention_us_per_token * PAGE
NODES = [0, 0, 1, 1]
ROOMS = [10_000] * 4


def move(levels, held, *, nodes=NODES, rooms=ROOMS, max_pages=100_000, price=0.001):
    return choose_move(levels, nodes, rooms, held, COST, PAGE, max_pages=max_pages, move_us_per_token=price)


def test_half_of_the_difference_moves_inside_the_node():
    found = move([200.0, 100.0, 20.0, 20.0], [Held(7, 0, {0: 5000})])
    assert (found.identity, found.source, found.target) == (7, 0, 1)
    assert found.num_pages == int((100.0 - COST.exchange_us_per_row) / (2 * PAGE_US))
    assert move([200.0, 100.0, 20.0, 20.0], [Held(7, 1, {0: 5000})]).num_pages == int(100.0 / (2 * PAGE_US)), "the home needs no new row"


def test_nothing_moves_without_a_request_a_difference_room_or_a_gain():
    held = [Held(1, 0, {0: 5000})]
    levels = [200.0, 100.0, 20.0, 20.0]
    assert move(levels, []) is None
    assert move([100.0] * 4, held) is None
    assert move(levels, held, rooms=[10_000, MIN_MOVE_PAGES - 1, 10_000, 10_000]) is None
    assert move(levels, held, nodes=[0, 1, 1, 1]) is None
    assert move(levels, held, price=1e3) is None, "the copy never pays"
    assert move([200.0, 199.99, 0.0, 0.0], held, nodes=[0] * 4, price=0.2) is None, "the second hottest ends the step anyway"


@settings(max_examples=200, deadline=None)
@given(
    levels=st.lists(st.floats(0, 500), min_size=4, max_size=4),
    pages=st.lists(st.integers(0, 9000), min_size=1, max_size=4),
    rooms=st.lists(st.integers(0, 9000), min_size=4, max_size=4),
    most=st.integers(0, 4000),
)
def test_a_move_never_makes_its_target_the_hottest(levels, pages, rooms, most):
    hottest = levels.index(max(levels))
    held = [Held(i, (hottest + i) % 4, {hottest: count}) for i, count in enumerate(pages) if count]
    found = move(levels, held, rooms=rooms, max_pages=most)
    if found is None:
        return
    assert found.source == hottest and NODES[found.target] == NODES[hottest] and found.target != hottest
    assert MIN_MOVE_PAGES <= found.num_pages <= min(most, rooms[found.target], max(pages) - 1)
    moved = found.num_pages * PAGE_US
    assert levels[found.target] + moved <= levels[hottest] - moved + 1e-9


def test_a_model_without_attention_cost_is_no_division_by_zero():
    flat = replace(COST, attention_us_per_token=1e-12)
    found = choose_move([9.0, 1.0], [0, 0], [50, 50], [Held(1, 0, {0: 40})], flat, PAGE, max_pages=30, move_us_per_token=0.0)
    assert found is not None and found.num_pages == pytest.approx(30)
