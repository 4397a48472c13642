"""From a placement to the pages that are asked for."""

from types import SimpleNamespace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from sglang_dcp.policy.split_limits import Layout, SplitLimits
from sglang_dcp.policy.types import Placement
from sglang_dcp.upstream.step.admission import page_segments


def request(shards, tokens, generated=0):
    placement = Placement(shards[-1], tuple(shards), tuple(tokens))
    return SimpleNamespace(rid="r1", dyncp_placement=placement, origin_input_ids=range(sum(tokens)), output_ids=range(generated))


def pools(pages, max_degree=4, guest_pages=None):
    return SplitLimits(pages, max_degree, pages if guest_pages is None else guest_pages, Layout(4, 4))


def test_split_follows_the_placement_with_one_tail_page():
    assert page_segments(request([2, 0], [32, 20]), 16, pools(64)) == ((2, 2), (0, 3))


def test_generated_tokens_go_to_the_tail():
    assert page_segments(request([2, 0], [32, 20], generated=40), 16, pools(64)) == ((2, 2), (0, 5))


def test_a_tail_larger_than_a_pool_spills_to_the_other_shards():
    assert page_segments(request([1, 0], [16, 16 * 9]), 16, pools(8)) == ((1, 3), (0, 8))


def test_what_a_guest_may_not_take_goes_home_and_to_others():
    assert page_segments(request([1, 0], [16 * 6, 16 * 3]), 16, pools(8, guest_pages=2)) == ((1, 2), (0, 8))
    assert page_segments(request([1, 0], [16 * 6, 16 * 5]), 16, pools(8, guest_pages=2)) == ((1, 2), (2, 2), (0, 8))


def test_a_request_beyond_its_reach_has_no_segments():
    """The door refuses it; an ask that can never be granted would keep pages promised for ever."""
    with pytest.raises(ValueError, match="exceed 10 pages"):
        page_segments(request([1, 0], [16 * 8, 16 * 5]), 16, pools(8, max_degree=2, guest_pages=2))


@given(st.lists(st.integers(1, 300), min_size=1, max_size=4), st.integers(0, 300))
def test_fits_pools_and_holds_all_tokens(tokens, generated):
    page, pool = 16, 32
    tokens = [max(1, t // page) * page for t in tokens[:-1]] + tokens[-1:]
    total = sum(tokens) + generated
    assume(total <= len(tokens) * pool * page)
    segments = page_segments(request(list(range(len(tokens))), tokens, generated), page, pools(pool, max_degree=len(tokens)))
    pages = [count for _, count in segments]
    assert all(1 <= count <= pool for count in pages)
    assert sum(pages) == max(len(tokens), min(-(-total // page) + 1, len(tokens) * pool))
