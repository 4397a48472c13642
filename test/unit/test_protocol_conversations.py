"""The protocol with conversations: requests end, stay, are taken over, branch off and are evicted, and nobody starves for them."""

from __future__ import annotations

import gc
import os
import sys
from types import FunctionType, ModuleType

import pytest

from testing.protocol.model import ProtocolModel


def finish(model, *requests, most_steps=2_000):
    for _ in range(most_steps):
        if all(request.finished_in_step is not None for request in requests):
            return
        model.step()
    pytest.fail("starved")


def counters(model):
    return [home.participant.retention.counters for home in model.homes]


def num_cached(model):
    return sum(home.num_cached_tokens for home in model.homes)


def num_retained(model):
    return sum(home.participant.retention.num_pages_here for home in model.homes)


def test_a_turn_takes_over_what_the_last_one_left():
    model = ProtocolModel(1, 2, 32, 4)
    req = model.arrive(0, 40, 9, (1, 0))
    finish(model, req)
    model.step()
    # The last token is never stored: 48 of 49.
    assert num_retained(model) == 12
    later = model.next_turn(req, 0, 6, 5, (1, 0))
    finish(model, later)
    assert num_cached(model) == 48
    model.drain(100)


def test_a_branch_keeps_the_pages_before_it_and_writes_those_behind_anew():
    model = ProtocolModel(1, 2, 32, 4)
    req = model.arrive(0, 60, 5, (1, 0))
    finish(model, req)
    branch = model.next_turn(req, 0, -23, 5, (1, 0))
    finish(model, branch)
    assert num_cached(model) == 40
    far = model.next_turn(branch, 0, -40, 5, (1, 0))
    finish(model, far)
    assert num_cached(model) == 40, "most of the sequence would be lost"
    model.drain(100)


@pytest.mark.parametrize("more", [0, 1, 2, 3])
def test_an_exact_repeat_computes_its_last_token(more):
    model = ProtocolModel(1, 2, 32, 4)
    req = model.arrive(0, 40 + more, 1, (1, 0))
    finish(model, req)
    again = model.arrive(0, req.origin_input_ids, 3, (1, 0))
    finish(model, again)
    assert num_cached(model) == (39 + more) // 4 * 4
    model.drain(100)


def test_a_turn_that_would_be_local_goes_on_from_a_retained_sequence():
    model = ProtocolModel(1, 2, 32, 4)
    req = model.arrive(0, 40, 5, (1, 0), flexible=True)
    finish(model, req)
    later = model.next_turn(req, 0, 4, 5, (0,), flexible=True)
    finish(model, later)
    assert num_cached(model) == 44
    model.drain(100)


def test_everybody_gets_on_though_all_pools_are_full_of_retained_pages():
    model = ProtocolModel(2, 3, 24, 4, chunk_tokens=32, cache_fraction=1.0)
    for turn in range(12):
        finish(model, model.arrive(turn % 3, 60, 3, (0, 1, 2)[turn % 2 :]))
    assert num_retained(model) >= 30
    growing = model.arrive(0, 8, 120)
    everybody = [growing, model.arrive(1, 70, 4), model.arrive(2, 200, 4, (0, 1, 2), flexible=True), model.arrive(1, 80, 4, (1, 2))]
    finish(model, *everybody, most_steps=400)
    assert all(sum(c.evictions[reason] for c in counters(model)) for reason in ("admission", "local"))
    model.drain(200)


def test_no_pool_retains_more_than_its_share():
    model = ProtocolModel(3, 2, 40, 4, cache_fraction=0.25)
    for turn in range(8):
        finish(model, model.arrive(turn % 2, 48, 2, (0, 1)))
        model.step()
        assert all(home.participant.retention.num_pages_here <= 10 for home in model.homes)
    model.drain(100)


def test_nothing_is_kept_free_for_nobody():
    """A few free pages would cost a whole sequence."""
    model = ProtocolModel(3, 2, 64, 4, cache_fraction=1.0)
    for home in range(2):
        finish(model, model.arrive(home, 248, 1, (1 - home, home)))
    for _ in range(4):
        model.step()
    assert num_retained(model) == 2 * 62
    local = model.arrive(0, 3, 40)
    while not local.output_ids:
        model.step()
    model.step()
    assert num_retained(model) == 62 and local.dyncp is None, "two pages for a local request that runs"
    finish(model, local)
    model.drain(100)


def test_a_share_of_nothing_retains_nothing():
    model = ProtocolModel(3, 2, 40, 4, cache_fraction=0.0)
    finish(model, model.arrive(0, 48, 2, (0, 1)))
    assert num_retained(model) == 0
    model.drain(100)


def test_abort_of_a_waiting_turn_leaves_the_sequence_and_abort_behind_the_grant_retains_it_again():
    for wait in range(4):
        model = ProtocolModel(4, 2, 32, 4)
        req = model.arrive(0, 48, 5, (1, 0))
        finish(model, req)
        later = model.next_turn(req, 0, 8, 5, (1, 0))
        for _ in range(wait):
            model.step()
        model.homes[0].abort(later)
        for _ in range(3):
            model.step()
        again = model.next_turn(req, 0, 8, 5, (1, 0))
        before = num_cached(model)
        finish(model, again)
        assert num_cached(model) - before in ((52,) if wait < 2 else (0, 52))
        model.drain(100)


@pytest.mark.parametrize("state", ["prefilling", "decoding"])
def test_abort_of_a_turn_that_has_taken_over_gives_all_up(state):
    model = ProtocolModel(4, 2, 32, 4, chunk_tokens=8)
    home = model.homes[0]
    req = model.arrive(0, 48, 5, (1, 0))
    finish(model, req)
    later = model.next_turn(req, 0, 40, 30, (1, 0))
    while not (home.chunked_req is later if state == "prefilling" else later in home.running and later.output_ids):
        model.step()
    assert num_cached(model) == 52
    home.abort(later)
    for _ in range(4):
        model.step()
    assert num_retained(model) == 0 and all(home.pool.num_givable_pages() == 32 for home in model.homes)
    again = model.next_turn(req, 0, 40, 5, (1, 0))
    finish(model, again)
    assert num_cached(model) == 52, "nothing was left to find"
    model.drain(100)


def test_a_turn_that_is_retracted_behind_its_hit_starts_over():
    """What it took over is given up with the rest; it computes everything again and ends."""
    model = ProtocolModel(6, 2, 40, 4, chunk_tokens=64)
    firsts = [model.arrive(home, 120, 1, (1 - home, home)) for home in range(2)]
    finish(model, *firsts)
    turns = [model.next_turn(first, home, 4, 60, (1 - home, home)) for home, first in enumerate(firsts)]
    while not all(turn.output_ids for turn in turns):
        model.step()
    assert num_cached(model) == 240
    finish(model, *turns)
    assert sum(home.num_retractions for home in model.homes) > 0
    assert all(len(turn.output_ids) == 60 for turn in turns)
    model.drain(100)


def test_a_waiting_turn_whose_sequence_is_evicted_asks_for_everything():
    model = ProtocolModel(5, 2, 24, 4, chunk_tokens=32)
    req = model.arrive(0, 48, 1, (1, 0))
    finish(model, req)
    first = model.arrive(1, 30, 60, (0, 1))
    for _ in range(4):
        model.step()
    everything = model.arrive(1, 130, 2, (0, 1))
    model.step()
    turn = model.next_turn(req, 0, 60, 2, (1, 0))
    finish(model, first, everything, turn)
    model.drain(200)


def talk(model, talks, place):
    """The next turn of a conversation that waits for its user: it goes on, branches off, begins anew, or comes to another home."""
    choose, last = model.random, talks[place]
    home = place % model.num_instances
    shards = tuple(choose.sample(range(model.num_instances), choose.randint(1, 2)))
    length = 0 if last is None else len(last.full_untruncated_fill_ids)
    if last is None or last.aborted or length > 100 or choose.random() < 0.05:
        talks[place] = model.arrive(home, choose.randint(16, 50), choose.randint(1, 9), shards, flexible=choose.random() < 0.8)
        return
    more = choose.randint(0, 12) if choose.random() < 0.7 else -choose.randint(1, length // 2)
    talks[place] = model.next_turn(last, home, more, choose.randint(1, 9), shards, flexible=choose.random() < 0.8)


def walk(model, talks, num_steps, chance=0.05):
    """The users of all conversations speak now and then, somebody else comes, somebody goes. chance: that a user speaks in a step."""
    for _ in range(num_steps):
        for place, last in enumerate(talks):
            if model.random.random() < chance and (last is None or last.aborted or last.finished_in_step is not None):
                talk(model, talks, place)
        if model.random.random() < 0.01:
            model.arrive_at_random()
        if model.random.random() < 0.005:
            model.abort_at_random()
        model.step()


def test_a_walk_of_conversations():
    """Every row reads the K/V of its own tokens, every page has one owner after every step, and everybody gets an answer."""
    for seed, shape in enumerate([(2, 40, 4), (3, 30, 4), (2, 24, 8)]):
        fractions = {"cache_fraction": (0.9, 1.0, 0.4)[seed], "max_guest_fraction": (1.0, 0.5, 1.0)[seed]}
        model = ProtocolModel(seed, *shape, chunk_tokens=32, **fractions)
        walk(model, [None] * 9, 1_500)
        model.drain(20_000)
        assert sum(c.hits for c in counters(model)) > 30
        assert sum(sum(c.evictions.values()) for c in counters(model)) > 30


WALK_STEPS = int(os.environ.get("DYNCP_WALK_STEPS", "2000"))
"""`make walk` takes 1,000,000."""


def bytes_of_ledger(model):
    """Of everything that the participants refer to."""
    seen, queue = {}, [home.participant for home in model.homes]
    while queue:
        item = queue.pop()
        if id(item) not in seen and not isinstance(item, type | FunctionType | ModuleType):
            seen[id(item)] = item
            queue.extend(gc.get_referents(item))
    return sum(map(sys.getsizeof, seen.values()))


@pytest.mark.timeout(7200)  # `make walk`
def test_nothing_is_left_in_the_ledger_of_turns_that_are_over():
    """After a long walk it has the memory that it had after a short one, but for the spare room of its dictionaries."""
    model = ProtocolModel(9, 3, 30, 4, chunk_tokens=32, cache_fraction=1.0, check_every=200)

    def bytes_after(num_steps):
        for start in range(0, num_steps, 1_000):
            walk(model, [None] * 9, min(num_steps - start, 1_000), chance=0.5)
            model.drain(20_000)
            for home in model.homes:
                home.done.clear()
                home.rows_by_slot.clear()
                home.participant.counters.admission_waits.clear()  # as the driver does in every step
        return bytes_of_ledger(model)

    first, hits, turns = bytes_after(500), sum(c.hits for c in counters(model)), model.num_requests
    more = bytes_after(WALK_STEPS) - first
    print(f"{model.num_requests - turns} turns, {more} bytes more than the {first} of a short walk")
    assert more < 8192
    assert model.num_requests - turns > WALK_STEPS // 10, "8 KiB are less than 64 bytes of each"
    assert sum(c.hits for c in counters(model)) - hits > WALK_STEPS // 50


def test_a_pinned_degree_is_kept_and_takes_the_shards_of_the_sequence():
    model = ProtocolModel(1, 3, 32, 4)
    req = model.arrive(0, 40, 9, (1, 0))
    finish(model, req)
    finish(model, model.next_turn(req, 0, 6, 5, (0, 1, 2)))
    assert num_cached(model) == 0, "degree 3 was asked for"
    finish(model, model.next_turn(req, 0, 6, 5, (2, 0)))
    assert num_cached(model) == 48
    model.drain(100)


def test_a_pinned_degree_is_reached_from_a_sequence_on_one_shard():
    model = ProtocolModel(1, 2, 32, 4)
    req = model.arrive(0, 40, 5, (1,))
    finish(model, req)
    later = model.next_turn(req, 0, 6, 5, (1, 0))
    finish(model, later)
    assert num_cached(model) == 44
    model.drain(100)
