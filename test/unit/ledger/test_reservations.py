"""Order and outcome of grants."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_dcp.ledger.messages import AskAdmission, AskGrowth
from sglang_dcp.ledger.reservations import Decision, GrantedSegment, ReservationTable, split_by_room

MANY = (100, 100, 100, 100)


def admission(handle, born, *segments, flexible=False):
    return AskAdmission(handle, born, flexible, segments)


def growth(handle, born, *shards, stuck=False, page_index=7, max_degree=4):
    return AskGrowth(handle, born, stuck, page_index, max_degree, shards)


def table_of(*asks, num_instances=4):
    """asks: (home, ask)."""
    table = ReservationTable(num_instances)
    for home, ask in asks:
        table.ask(home, ask)
    return table


def decide(table, free, guest_room=MANY, anybody_runs=True) -> Decision:
    return table.decide(free, guest_room, anybody_runs)


def granted(decision):
    return [(grant.home, grant.handle) for grant in decision.grants]


def test_order_is_step_then_home_then_handle():
    table = table_of((1, admission(1, 5, (0, 1))), (0, admission(9, 5, (0, 1))), (0, admission(8, 5, (0, 1))), (3, admission(1, 4, (0, 1))))
    assert granted(decide(table, [4, 0, 0, 0])) == [(3, 1), (0, 8), (0, 9), (1, 1)]
    assert len(table) == 0


@given(st.permutations([(0, 1, 3), (0, 2, 3), (1, 1, 2), (2, 1, 9), (3, 5, 1)]), st.integers(0, 6))
def test_the_order_of_asking_does_not_matter(asks, free):
    table = table_of(*((home, admission(handle, born, (0, 2))) for home, handle, born in asks))
    expected = [(3, 5), (1, 1), (0, 1), (0, 2), (2, 1)][: free // 2]
    assert granted(decide(table, [free, 0, 0, 0])) == expected


def test_growth_goes_before_an_older_admission():
    table = table_of((0, admission(1, 0, (2, 1))), (1, growth(1, 99, 2, max_degree=1)))
    decision = decide(table, [0, 0, 1, 0])
    assert granted(decision) == [(1, 1)]
    assert decision.grants[0].segments == (GrantedSegment(2, 7, 1),)
    assert len(table) == 1


def test_admission_is_all_or_nothing():
    table = table_of((0, admission(1, 0, (1, 5), (0, 3))))
    assert granted(decide(table, [3, 4, 9, 9])) == []
    decision = decide(table, [3, 5, 0, 0])
    assert decision.grants[0].segments == (GrantedSegment(1, 0, 5), GrantedSegment(0, 5, 3))


def test_the_first_waiting_ask_is_promised_its_split_also_what_is_still_taken():
    table = table_of((0, admission(1, 0, (1, 5), (0, 3))), (2, admission(1, 1, (1, 1))), (3, admission(1, 2, (3, 1))))
    decision = decide(table, [3, 4, 9, 9])
    assert granted(decision) == [(3, 1)], "nobody behind may take instance 1's pages; others are free to"
    assert decision.promised == (3, 5, 0, 0)


def test_only_the_first_waiting_ask_is_promised_anything():
    table = table_of((0, admission(1, 0, (1, 5))), (2, admission(1, 1, (3, 50))))
    assert decide(table, [3, 4, 9, 9]).promised == (0, 5, 0, 0)


def test_ageing_a_stream_of_small_asks_cannot_starve_a_large_one():
    """Instance 1 has 8 pages, 6 in use; a small ask arrives in every step and each granted one is over three steps later."""
    table, ends, free = table_of((0, admission(1, 0, (1, 8))), num_instances=2), [2, 2, 3, 3, 3, 4], 2
    for step in range(1, 20):
        free += ends.count(step)
        table.ask(1, admission(step, step, (1, 1)))
        for home, _ in granted(decide(table, [0, free], guest_room=(9, 9))):
            if home == 0:
                assert step <= 4
                return
            free -= 1
            ends.append(step + 3)
    pytest.fail("starved")


def test_guest_room_is_kept_for_the_first_waiting_ask():
    """Pages are plenty, the bound on guests is what it waits for: those behind must leave that too."""
    table = table_of((0, admission(1, 0, (1, 5))), (0, admission(2, 1, (1, 2))))
    assert granted(decide(table, [9, 99, 9, 9], guest_room=(9, 4, 9, 9))) == []
    assert granted(decide(table, [9, 99, 9, 9], guest_room=(9, 7, 9, 9))) == [(0, 1), (0, 2)]


def test_guest_room_does_not_bound_the_home():
    table = table_of((1, admission(1, 0, (1, 5))))
    assert granted(decide(table, [0, 5, 0, 0], guest_room=(0, 0, 0, 0))) == [(1, 1)]


def test_grants_use_up_guest_room():
    table = table_of((0, admission(1, 0, (1, 3))), (2, admission(1, 1, (1, 3))), (1, admission(1, 2, (1, 3))))
    assert granted(decide(table, MANY, guest_room=(9, 5, 9, 9))) == [(0, 1), (1, 1)]


def test_a_flexible_ask_is_split_otherwise():
    table = table_of((0, admission(1, 0, (1, 5), (0, 3), flexible=True)))
    decision = decide(table, [3, 4, 6, 0])
    assert sum(segment.num_pages for segment in decision.grants[0].segments) == 8
    assert [segment.rank for segment in decision.grants[0].segments] == [1, 2]


def test_a_flexible_ask_for_one_instance_moves_whole_or_waits_with_its_promise():
    table = table_of((0, admission(1, 0, (1, 5), flexible=True)))
    decision = decide(table, [3, 4, 4, 0])
    assert not decision.grants and decision.promised == (0, 5, 0, 0)
    assert [(segment.rank, segment.num_pages) for segment in decide(table, [3, 4, 5, 0]).grants[0].segments] == [(2, 5)]


def test_a_flexible_ask_keeps_its_own_split_when_that_fits():
    table = table_of((0, admission(1, 0, (1, 5), (0, 3), flexible=True)))
    assert [segment.rank for segment in decide(table, MANY).grants[0].segments] == [1, 0]


def test_withdrawn_asks_are_gone():
    table = table_of((0, admission(1, 0, (1, 5))), (0, growth(1, 0, 1)))
    table.withdraw(0, 1)
    table.withdraw(0, 1)
    assert len(table) == 0
    assert decide(table, MANY) == Decision((), (0, 0, 0, 0), ())


def test_asking_again_replaces():
    table = table_of((0, growth(1, 0, 1, max_degree=1)), (0, growth(1, 0, 1, max_degree=1, stuck=True)))
    assert len(table) == 1
    assert decide(table, [0, 0, 0, 0], anybody_runs=False).victims == ((0, 1),)


def test_victim_is_the_youngest_stuck():
    table = table_of(
        (0, growth(1, 3, 0, stuck=True)), (1, growth(1, 9, 0, stuck=True)), (2, growth(1, 10, 0)), (3, growth(4, 2, 0, stuck=True))
    )
    decision = decide(table, [0, 0, 0, 0])
    assert decision.victims == ((1, 1),)
    assert not decision.grants


def test_one_stuck_request_waits_while_others_run():
    table = table_of((0, growth(1, 3, 0, stuck=True)))
    assert decide(table, [0] * 4).victims == ()
    assert decide(table, [0] * 4, anybody_runs=False).victims == ((0, 1),)


def test_a_grant_in_the_step_spares_the_last_stuck_request():
    table = table_of((0, growth(1, 3, 0, stuck=True, max_degree=1)), (1, growth(1, 9, 1, stuck=True)))
    decision = decide(table, [0, 1, 0, 0], anybody_runs=False)
    assert granted(decision) == [(1, 1)]
    assert decision.victims == ()


def test_a_stuck_growth_is_promised_a_page_wherever_it_may_grow():
    assert decide(table_of((0, growth(1, 3, 0, 2, stuck=True, max_degree=2))), [0, 5, 0, 5]).promised == (1, 0, 1, 0)
    assert decide(table_of((0, growth(1, 3, 0, stuck=True))), [0, 0, 0, 0]).promised == (1, 1, 1, 1)
    assert decide(table_of((0, growth(1, 3, 0))), [0, 0, 0, 0]).promised == (0, 0, 0, 0)


def test_two_growths_do_not_share_a_page():
    table = table_of((0, growth(1, 1, 0)), (1, growth(1, 1, 1)))
    assert granted(decide(table, [0, 0, 0, 1])) == [(0, 1)]


# ---- split_by_room


@given(st.integers(0, 3), st.integers(1, 60), st.lists(st.integers(-3, 20), min_size=4, max_size=4))
def test_split_by_room(home, num_pages, limits):
    split = split_by_room(home, num_pages, limits)
    positive = sorted((max(0, limit) for limit in limits), reverse=True)
    if split is None:
        assert sum(positive) < num_pages
        return
    assert sum(pages for _, pages in split) == num_pages
    assert all(0 < pages <= limits[rank] for rank, pages in split)
    assert len({rank for rank, _ in split}) == len(split)
    fewest = next(count for count in range(1, 5) if sum(positive[:count]) >= num_pages)
    assert len(split) <= fewest
    ranks = [rank for rank, _ in split]
    assert home not in ranks[:-1]
    left = [limits[rank] - pages for rank, pages in split]
    assert max(left) - min(left) <= 1, "equally empty"


def test_split_by_room_prefers_home_among_equals():
    assert split_by_room(2, 5, [5, 5, 5, 5]) == ((2, 5),)


def test_split_by_room_leaves_the_chosen_equally_empty():
    assert split_by_room(0, 20, [18, 12, 3, 4]) == ((1, 7), (0, 13))
