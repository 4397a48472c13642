"""Order and outcome of grants."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_dcp.ledger.messages import AskAdmission, AskGrowth
from sglang_dcp.ledger.promise_turns import FIRST_TURN_STEPS, PromiseTurns
from sglang_dcp.ledger.reservations import MOST_REFUSED, Decision, GrantedSegment, ReservationTable
from sglang_dcp.policy.split_limits import Layout, SplitLimits

MANY = (100, 100, 100, 100)


def admission(handle, born, *segments, flexible=False):
    return AskAdmission(handle, born, flexible, segments)


def growth(handle, born, *shards, stuck=False, page_index=7):
    return AskGrowth(handle, born, stuck, page_index, shards)


def table_of(*asks, num_instances=4, max_degree=None, guest_pages=99, node_size=None, crosses=False):
    """asks: (home, ask). Pools of 99 pages, too few to leave any to growth."""
    layout = Layout(num_instances, node_size or num_instances, crosses)
    table = ReservationTable(SplitLimits(99, max_degree or num_instances, guest_pages, layout))
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
    table = table_of((0, admission(1, 0, (2, 1))), (1, growth(1, 99, 2)), max_degree=1)
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
    table = table_of((0, growth(1, 0, 1)), (0, growth(1, 0, 1, stuck=True)), max_degree=1)
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
    table = table_of((0, growth(1, 3, 0, stuck=True)), (1, growth(1, 9, 1, stuck=True)), max_degree=1)
    decision = decide(table, [0, 1, 0, 0], anybody_runs=False)
    assert granted(decision) == [(1, 1)]
    assert decision.victims == ()


def test_a_stuck_growth_is_promised_a_page_wherever_it_may_grow():
    assert decide(table_of((0, growth(1, 3, 0, 2, stuck=True)), max_degree=2), [0, 5, 0, 5]).promised == (1, 0, 1, 0)
    assert decide(table_of((0, growth(1, 3, 0, stuck=True))), [0, 0, 0, 0]).promised == (1, 1, 1, 1)
    assert decide(table_of((0, growth(1, 3, 0))), [0, 0, 0, 0]).promised == (0, 0, 0, 0)


def test_two_growths_do_not_share_a_page():
    table = table_of((0, growth(1, 1, 0)), (1, growth(1, 1, 1)))
    assert granted(decide(table, [0, 0, 0, 1])) == [(0, 1)]


# ---- limits of a split


def test_a_flexible_ask_is_never_split_over_more_than_the_degree():
    """Three pieces would fit: on today's books that was granted, whatever --dyncp-max-degree said."""
    table = table_of((0, admission(1, 0, (1, 5), (0, 5), flexible=True)), max_degree=2)
    assert not decide(table, [4, 3, 3, 3]).grants
    assert granted(decide(table, [4, 3, 6, 3])) == [(0, 1)]


def test_a_flexible_ask_stays_in_its_node_which_could_hold_it():
    table = table_of((0, admission(1, 0, (1, 5), (0, 5), flexible=True)), node_size=2)
    assert not decide(table, [4, 3, 60, 60]).grants
    assert [segment.rank for segment in decide(table, [4, 6, 60, 60]).grants[0].segments] == [1, 0]


def test_a_request_beyond_its_node_is_split_over_others_where_it_may():
    beyond = 0, admission(1, 0, (1, 99), (2, 60), (0, 90), flexible=True)
    assert granted(decide(table_of(beyond, node_size=2, crosses=True), [99, 60, 60, 60])) == [(0, 1)]
    with pytest.raises(ValueError, match="can never be granted within"):
        table_of(beyond, node_size=2)


@pytest.mark.parametrize("max_degree", [2, 4])
def test_what_is_taken_over_is_continued_in_the_node(max_degree):
    """The roomiest instances are in another node: they must not use up the shards that the degree leaves."""
    table = table_of(node_size=2, max_degree=max_degree)
    table.retained.put(0, 7, ((0, 10),), step=1)
    table.ask(0, AskAdmission(8, 2, True, ((0, 30),), previous=7, kept=((0, 10),)))
    assert [segment.rank for segment in decide(table, [5, 40, 90, 90]).grants[0].segments] == [1]


def test_growth_stays_in_its_node_while_that_could_hold_it():
    table = table_of((0, growth(1, 0, 0, stuck=True)), node_size=2)
    assert decide(table, [0, 0, 9, 9]).promised == (1, 1, 0, 0)
    assert decide(table, [0, 1, 9, 9]).grants[0].segments[0].rank == 1
    beyond = 0, growth(1, 0, 0, 1, page_index=200)
    assert not decide(table_of(beyond, node_size=2), [0, 0, 9, 9]).grants
    assert decide(table_of(beyond, node_size=2, crosses=True), [0, 0, 9, 9]).grants[0].segments[0].rank == 2


def test_growth_takes_a_guest_page_of_a_new_shard_only_where_guests_have_room():
    table = table_of((0, growth(1, 0, 0)), (0, growth(2, 0, 0, 2)))
    assert [grant.segments[0].rank for grant in decide(table, [0, 9, 9, 9], guest_room=(0, 0, 0, 1)).grants] == [3, 2]
    assert not decide(table_of((0, growth(1, 0, 0))), [0, 9, 9, 9], guest_room=(0, 0, 0, 0)).grants


@pytest.mark.parametrize(
    ("segments", "why"),
    [([(1, 31), (0, 1)], "guest pages"), ([(0, 101)], "the pool"), ([(1, 1), (2, 1), (0, 1)], "degree"), ([(1, 1), (1, 1)], "twice")],
)
def test_a_split_that_no_cluster_can_grant_is_no_ask(segments, why):
    """Its pages would stay promised for ever, on an empty cluster too."""
    table = table_of(max_degree=2, guest_pages=30)
    with pytest.raises(ValueError, match="can never be granted"):
        table.ask(0, admission(1, 0, *segments, flexible=True))
    assert not len(table), why


# ---- what a decision costs


@pytest.mark.parametrize("kind", ["admission", "flexible", "stuck growth", "growth"])
def test_a_decision_looks_at_few_asks_however_many_wait(kind):
    make = {
        "admission": lambda i: admission(i, i, (1, 5), (0, 5)),
        "flexible": lambda i: admission(i, i, (1, 5), (0, 5), flexible=True),
        "stuck growth": lambda i: growth(i, i, 0, stuck=True),
        "growth": lambda i: growth(i, i, 0),
    }[kind]
    table = table_of(*((0, make(i)) for i in range(1000)))
    seen = []
    for _ in range(3):
        decide(table, [0, 0, 0, 0])
        seen.append(table.num_looked_at)
    assert max(seen) <= MOST_REFUSED + 2 and len(table) == 1000


def test_every_waiting_ask_gets_its_look():
    """Nine tenths of the asks wait for instance 1; those for instance 3 are granted all the same, each within a round."""
    table = table_of(*((0, admission(i, i, (1 if i % 10 else 3, 5))) for i in range(1, 301)))
    found = []
    for _ in range(300 // MOST_REFUSED + 1):
        found += [handle for _, handle in granted(decide(table, [0, 0, 0, 5 * 30]))]
    assert sorted(found) == list(range(10, 301, 10))


def test_the_youngest_of_a_thousand_stuck_requests_yields():
    table = table_of(*((i % 4, growth(i, 5000 - i, i % 4, stuck=True)) for i in range(1000)))
    assert decide(table, [0, 0, 0, 0]).victims == ((0, 0),)


# ---- whose turn it is while an ask waits


def test_an_ask_near_the_cluster_s_size_leaves_others_half_of_the_steps():
    table = table_of((0, admission(1, 0, (1, 99), (0, 90))))
    held = [any(decide(table, [50, 50, 9, 9]).promised) for _ in range(40 * FIRST_TURN_STEPS)]
    assert all(held[:FIRST_TURN_STEPS]) and not any(held[FIRST_TURN_STEPS : 2 * FIRST_TURN_STEPS])
    for steps in range(2 * FIRST_TURN_STEPS, len(held), FIRST_TURN_STEPS):
        assert sum(held[:steps]) <= steps * 2 / 3 + FIRST_TURN_STEPS


def test_behind_it_asks_are_granted_in_the_others_turn():
    table = table_of((0, admission(1, 0, (1, 99), (0, 90))), (2, admission(1, 1, (1, 5))))
    steps = next(step for step in range(1000) if granted(decide(table, [50, 50, 9, 9])))
    assert steps == FIRST_TURN_STEPS


def test_turns_grow_until_all_that_ran_has_ended():
    """Whatever starts in the others' turn and lasts LIFE steps: a turn of the waiting ask comes that is longer."""
    turns, own, longest = PromiseTurns(), 0, 0
    for _ in range(20_000):
        own = own + 1 if turns.is_promised((0, 0, 1)) else 0
        longest = max(longest, own)
    assert longest >= 4096


def test_turns_begin_anew_with_another_ask():
    turns = PromiseTurns()
    assert [turns.is_promised((0, 0, 1)) for _ in range(FIRST_TURN_STEPS + 1)].count(False) == 1
    assert turns.is_promised((0, 0, 2)) and turns.is_promised((0, 0, 1))
