"""Every token counts once, from its placement to the pages of several pools, and no clock decides when."""

from __future__ import annotations

import random

import pytest

from sglang_dcp.policy.cluster_view import ClusterView, HomeReport
from sglang_dcp.policy.types import Placement


def view_of(num_instances: int, capacity: int = 1024) -> ClusterView:
    view = ClusterView([0] * num_instances)
    for rank in range(num_instances):
        view.take_report(rank, capacity, HomeReport(0, 0, {}))
    return view


def tokens(view: ClusterView) -> list[int]:
    return [load.kv_tokens for load in view.loads()]


def requests(view: ClusterView) -> list[int]:
    return [load.home_requests for load in view.loads()]


def test_a_placement_stays_until_its_home_has_taken_it_in() -> None:
    view = view_of(2)
    assert [view.place(Placement(0, (0,), (64,))), view.place(Placement(0, (0,), (32,)))] == [1, 2]
    for _ in range(5):
        view.take_report(0, 1024, HomeReport(0, 0, {0: 0}))
        assert (tokens(view), requests(view)) == ([96, 0], [2, 0])
    view.take_report(0, 1024, HomeReport(1, 1, {0: 64}))
    assert (tokens(view), requests(view)) == ([96, 0], [2, 0])
    view.take_report(0, 1024, HomeReport(2, 2, {0: 96}))
    assert (tokens(view), requests(view)) == ([96, 0], [2, 0])


def test_what_was_refused_or_aborted_on_its_way_does_not_stay() -> None:
    """The home has taken it in and holds nothing of it."""
    view = view_of(2)
    view.place(Placement(0, (0,), (64,)))
    view.take_report(0, 1024, HomeReport(1, 0, {0: 0}))
    assert (tokens(view), requests(view)) == ([0, 0], [0, 0])


def test_a_split_request_counts_once_whichever_instance_reports_first() -> None:
    """Its shards' reports say nothing of it: they are of their own requests."""
    view = view_of(3)
    view.place(Placement(2, (0, 1, 2), (160, 160, 80)))
    expected = [160, 160, 80]
    for rank in (0, 1):
        view.take_report(rank, 1024, HomeReport(0, 0, {rank: 0}))
        assert tokens(view) == expected
    for waiting_or_granted in ({0: 160, 1: 160, 2: 80}, {0: 160, 1: 160, 2: 80}):
        view.take_report(2, 1024, HomeReport(1, 1, waiting_or_granted))
        assert tokens(view) == expected
    assert [load.guest_tokens for load in view.loads()] == [160, 160, 0]
    view.take_report(2, 1024, HomeReport(1, 0, {}))
    assert tokens(view) == [0, 0, 0] and [load.guest_tokens for load in view.loads()] == [0, 0, 0]


def test_a_number_that_was_never_given_is_refused() -> None:
    view = view_of(2)
    view.place(Placement(0, (0,), (64,)))
    with pytest.raises(ValueError, match=r"instance 1 reports placement 1, it was sent 0"):
        view.take_report(1, 1024, HomeReport(1, 0, {}))


@pytest.mark.parametrize("seed", range(20))
def test_totals_are_those_of_the_requests_that_live(seed: int) -> None:
    """Random placements, arrivals and ends; reports of every age in every order."""
    choose, view = random.Random(seed), view_of(4)
    sent: list[list[Placement]] = [[] for _ in range(4)]
    arrived, ended = [0] * 4, [set() for _ in range(4)]  # type: ignore[var-annotated]
    reported: list[tuple[int, frozenset[int]]] = [(0, frozenset())] * 4
    for _ in range(200):
        home = choose.randrange(4)
        match choose.randrange(4):
            case 0:
                shards = (*choose.sample([rank for rank in range(4) if rank != home], choose.randrange(3)), home)
                sent[home].append(Placement(home, shards, tuple(choose.randrange(1, 9) for _ in shards)))
                view.place(sent[home][-1])
            case 1:
                arrived[home] = min(len(sent[home]), arrived[home] + choose.randrange(3))
            case 2 if arrived[home]:
                ended[home].add(choose.randrange(arrived[home]))
            case 3:
                held: dict[int, int] = {}
                living = [item for number, item in enumerate(sent[home][: arrived[home]]) if number not in ended[home]]
                for item in living:
                    for rank, count in zip(item.shards, item.shard_tokens, strict=True):
                        held[rank] = held.get(rank, 0) + count
                view.take_report(home, 1024, HomeReport(arrived[home], len(living), held))
                reported[home] = (arrived[home], frozenset(ended[home]))
        expected = [0] * 4
        for placements, (taken_in, over) in zip(sent, reported, strict=True):
            for number, item in enumerate(placements):
                if number >= taken_in or number not in over:
                    for rank, count in zip(item.shards, item.shard_tokens, strict=True):
                        expected[rank] += count
        assert tokens(view) == expected
