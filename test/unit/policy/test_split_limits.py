"""How a request may be split: what fits, where, and what can never."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_dcp.policy.split_limits import Layout, SplitLimits, SplitRule


def limits_of(pool: int = 20, max_degree: int = 4, guests: int | None = None, num_instances: int = 4, node_size: int = 4) -> SplitLimits:
    return SplitLimits(pool, max_degree, pool if guests is None else guests, Layout(num_instances, node_size))


@given(st.integers(0, 3), st.integers(1, 60), st.lists(st.integers(-3, 20), min_size=4, max_size=4))
def test_split_takes_as_few_as_possible_and_leaves_them_equally_empty(home: int, num_pages: int, room: list[int]) -> None:
    split = limits_of().split(home, num_pages, room)
    positive = sorted((max(0, pages) for pages in room), reverse=True)
    if split is None:
        assert sum(positive) < num_pages
        return
    assert sum(pages for _, pages in split) == num_pages
    assert all(0 < pages <= room[rank] for rank, pages in split)
    assert len({rank for rank, _ in split}) == len(split)
    assert len(split) <= next(count for count in range(1, 5) if sum(positive[:count]) >= num_pages)
    assert home not in [rank for rank, _ in split][:-1]
    left = [room[rank] - pages for rank, pages in split]
    assert max(left) - min(left) <= 1, "equally empty"


def test_split_prefers_home_among_equals() -> None:
    assert limits_of().split(2, 5, [5, 5, 5, 5]) == ((2, 5),)
    assert limits_of().split(0, 20, [18, 12, 3, 4]) == ((1, 7), (0, 13))


CLUSTERS = [(1, 1), (2, 1), (4, 2), (6, 2), (4, 4), (6, 3)]
SHAPES = st.tuples(st.integers(2, 6), st.integers(1, 6), st.integers(0, 6), st.sampled_from(CLUSTERS), st.booleans())
"""(pages of a pool, degree, guest pages, (instances, instances of a node), shards may cross)."""


@given(SHAPES, st.integers(0, 5), st.integers(1, 40), st.data())
def test_every_rule_keeps_every_limit(shape: tuple, home: int, num_pages: int, data: st.DataObject) -> None:
    """Against a plain count: what fits some set of at most max_degree ranks of the node, of all where shards may cross and the node could
    not hold it."""
    pool, degree, guests, (count, node_size), crosses = shape
    limits = SplitLimits(pool, degree, min(pool, guests), Layout(count, node_size, crosses))
    home %= count
    node = [rank for rank in range(count) if rank // node_size == home // node_size]

    def most(ranks: list[int], room: list[int]) -> int:
        able = [min(room[rank], pool if rank == home else min(pool, guests)) for rank in ranks]
        return max(sum(chosen) for size in range(1, min(degree, len(able)) + 1) for chosen in itertools.combinations(able, size))

    empty = [pool] * count
    scope = list(range(count)) if crosses and most(node, empty) < num_pages else node
    can = most(scope, empty) >= num_pages
    assert list(limits.scope(home, num_pages)) == scope
    room = data.draw(st.lists(st.integers(0, pool), min_size=count, max_size=count))
    split = limits.split(home, num_pages, room)
    assert (split is not None) == (most(scope, room) >= num_pages)
    segment = st.tuples(st.integers(0, count - 1) if crosses else st.sampled_from(node), st.integers(1, pool))
    wished = data.draw(st.lists(segment, min_size=1, max_size=4, unique_by=lambda s: s[0]))
    complete = limits.complete(home, wished, num_pages)
    assert complete is not None or not can or num_pages < len(wished)
    for answer in (split, complete, limits.whole(home, num_pages, room)):
        if answer is not None and (can or answer is not complete):
            assert limits.fits(home, answer), answer
            assert answer is complete or {rank for rank, _ in answer} <= set(scope)


KEPT = st.lists(st.tuples(st.integers(0, 5), st.integers(1, 6)), min_size=1, max_size=4, unique_by=lambda pair: pair[0])


@given(SHAPES, st.integers(0, 5), st.integers(1, 30), KEPT, st.data())
def test_pages_behind_a_prefix_are_split_as_the_whole_sequence_may_be(shape: tuple, home: int, pages: int, kept: list, data) -> None:
    """Against a plain count over all sets of ranks that contain the prefix's."""
    pool, degree, guests, (count, node_size), crosses = shape
    limits = SplitLimits(pool, degree, min(pool, guests), Layout(count, node_size, crosses))
    home %= count
    before = {rank % count: held for rank, held in kept}
    kept = [
        (rank, min(held, limits.most_pages(home, rank)))
        for rank, held in before.items()
        if limits.most_pages(home, rank) and rank in limits.layout.group(home)
    ]
    kept = kept[:degree]
    before = dict(kept)
    room = data.draw(st.lists(st.integers(0, pool), min_size=count, max_size=count))
    fresh = [rank for rank in limits.scope(home, pages + sum(before.values())) if rank not in before]
    able = {rank: min(room[rank], limits.most_pages(home, rank) - before.get(rank, 0)) for rank in [*fresh, *before]}
    sets = [(*before, *more) for size in range(degree - len(before) + 1) for more in itertools.combinations(fresh, size)]
    enough = [chosen for chosen in sets if sum(able[rank] for rank in chosen) >= pages]
    split = limits.split(home, pages, room, kept)
    assert (split is not None) == bool(enough)
    if split is not None:
        whole = {rank: before.get(rank, 0) + dict(split).get(rank, 0) for rank in {*before, *dict(split)}}
        assert limits.fits(home, tuple(whole.items()))
        assert sum(count for _, count in split) == pages and all(count <= able[rank] for rank, count in split)
        assert len(whole) <= min(len(chosen) for chosen in enough), "no new shard without need"


def test_complete_fills_the_tail_first_and_takes_from_the_head() -> None:
    limits = limits_of(8)
    assert limits.complete(0, [(1, 3), (0, 1)], 6) == ((1, 3), (0, 3))
    assert limits.complete(0, [(1, 3), (0, 6)], 12) == ((1, 4), (0, 8))
    assert limits.complete(0, [(1, 3), (0, 3)], 4) == ((1, 1), (0, 3))
    assert limits.complete(0, [(1, 8), (0, 8)], 20) == ((1, 8), (2, 4), (0, 8))


def test_whole_is_at_home_where_that_has_room_and_never_beyond_a_guest_s_pages() -> None:
    limits = limits_of(guests=10)
    assert limits.whole(1, 8, [20, 8, 9, 0]) == ((1, 8),)
    assert limits.whole(1, 8, [20, 7, 9, 0]) == ((0, 8),)
    assert limits.whole(1, 11, [20, 7, 20, 0]) == ((1, 11),)
    assert limits.whole(1, 11, [20, 20, 20, 0], at_home=False) is None
    assert limits.whole(1, 21, [20, 20, 20, 20]) is None


def test_layout() -> None:
    layout = Layout(6, 2)
    assert layout.nodes == [0, 0, 1, 1, 2, 2] and list(layout.members(3)) == [2, 3]
    assert layout.groups == [range(2), range(2, 4), range(4, 6)] and layout.group(3) == range(2, 4) and layout.group_size == 2
    crossing = Layout(6, 2, crosses=True)
    assert crossing.nodes == layout.nodes and crossing.groups == [range(6)] and crossing.group(3) == range(6) and crossing.group_size == 6
    assert Layout(6, 4).groups == [range(4), range(4, 6)] and Layout(4, 8).group_size == 4
    assert Layout(4, 8).nodes == [0] * 4 and list(Layout(6, 4).members(5)) == [4, 5]
    with pytest.raises(ValueError, match="4 instances, 0 per node, has none"):
        Layout(4, 0)


def test_guest_pages_and_reach() -> None:
    assert [SplitRule(4, fraction).guest_pages(100) for fraction in (0.0, 0.29, 0.5, 1.0)] == [0, 29, 50, 100]
    rule = SplitRule(3, 0.5)
    assert rule.reach_pages([10, 10, 10], degree=2) == 15 and rule.reach_pages([10, 40, 10]) == 50
    assert rule.reach_pages([10, 40, 10], degree=2, home=0) == 30
    assert rule.limits(10, Layout(3, 3)).reach_pages == rule.reach_pages([10, 10, 10]) == 20
