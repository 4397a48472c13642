"""The protocol with prefixes that several requests read at once: questions to a document, with readers that come, go, stay and starve."""

from __future__ import annotations

import pytest

from test.unit.test_protocol_conversations import counters, finish, num_cached, num_retained
from testing.protocol.model import ProtocolModel

DOCUMENT = [9_999] * 48


def ask(model, home=0, more=6, max_new=5, shards=(1, 0), **kwargs):
    """A question to the document."""
    return model.arrive(home, [*DOCUMENT, *[model.num_requests + 1] * more], max_new, shards, **kwargs)


def steps_until(model, is_so, most_steps=200):
    for _ in range(most_steps):
        if is_so():
            return
        model.step()
    pytest.fail(f"not so after {most_steps} steps")


def decodes(req):
    return lambda: bool(req.output_ids)


def borrows(model):
    return sum(c.borrows for c in counters(model))


@pytest.mark.parametrize("page_size", [4, 16])
def test_questions_to_a_document_that_somebody_reads_compute_their_own_tokens_alone(page_size):
    model = ProtocolModel(1, 2, 128 // page_size, page_size, chunk_tokens=64)
    first = ask(model, max_new=60)
    steps_until(model, decodes(first))
    others = [ask(model), ask(model)]
    finish(model, *others)
    assert first.finished_in_step is None
    assert (num_cached(model), borrows(model)) == (2 * 48, 2)
    assert num_retained(model) >= 48 // page_size, "the document, once"
    finish(model, first)
    late = ask(model)
    finish(model, late)
    assert num_cached(model) == 3 * 48
    model.drain(100)


def test_who_asks_while_the_document_is_computed_waits_for_it():
    model = ProtocolModel(1, 2, 32, 4, chunk_tokens=8)
    first = ask(model, max_new=40)
    model.step()
    second = ask(model)
    stranger = model.arrive(0, 60, 3, (1, 0))
    finish(model, second, stranger)
    assert (num_cached(model), borrows(model)) == (48, 1)
    assert first.finished_in_step is None
    model.drain(100)


@pytest.mark.parametrize("state", ["waiting", "prefilling"])
def test_who_waits_for_another_that_is_aborted_computes_by_itself(state):
    model = ProtocolModel(1, 2, 32, 4, chunk_tokens=8)
    first = ask(model)
    if state == "prefilling":
        steps_until(model, lambda: model.homes[0].chunked_req is first)
    second = ask(model)
    model.step()
    model.homes[0].abort(first)
    finish(model, second)
    assert num_cached(model) == 0
    model.drain(100)


def test_a_short_common_beginning_is_not_worth_to_wait_for():
    model = ProtocolModel(1, 2, 64, 4, chunk_tokens=8)
    first = model.arrive(0, [7] * 24 + [1] * 80, 3, (1, 0))
    model.step()
    second = model.arrive(0, [7] * 24 + [2] * 40, 3, (1, 0))
    for _ in range(3):
        model.step()
    assert second.dyncp is not None and not first.output_ids
    model.drain(100)


def test_a_much_longer_one_that_waits_for_pages_is_not_worth_to_wait_for():
    """It begins alike, waits until somebody ends, and is no further with what they have in common than the shorter one."""
    model = ProtocolModel(1, 2, 64, 4, chunk_tokens=400)
    runs = model.arrive(0, 300, 150, (1, 0))
    steps_until(model, decodes(runs))
    long = model.arrive(0, [7] * 24 + [1] * 260, 3, (1, 0))
    model.step()
    short = model.arrive(0, [7] * 24 + [2] * 8, 3, (1, 0))
    steps_until(model, decodes(short), 100)
    assert not long.dyncp.admitted and not runs.finished()
    model.drain(300)


def test_a_reader_is_a_conversation_too():
    """It leaves its own pages behind those that it reads, and its next turn goes on from both."""
    model = ProtocolModel(1, 2, 64, 4, chunk_tokens=64)
    first = ask(model, max_new=80)
    steps_until(model, decodes(first))
    second = ask(model, more=9, max_new=8)
    finish(model, second)
    turn = model.next_turn(second, 0, 10, 4, (1, 0))
    finish(model, turn)
    # 57 tokens and 8 of the answer, of which the last is never stored.
    assert num_cached(model) == 48 + 64 and borrows(model) == 1
    again = model.next_turn(turn, 0, 3, 3, (0, 1))
    finish(model, again)
    assert first.finished_in_step is None
    model.drain(100)


def test_what_is_read_is_not_evicted_and_what_nobody_reads_goes_readers_first():
    model = ProtocolModel(1, 2, 32, 4, chunk_tokens=64, cache_fraction=1.0)
    first = ask(model, max_new=30)
    steps_until(model, decodes(first))
    second = ask(model, max_new=12)
    finish(model, second)
    everything = model.arrive(1, 190, 2, (0, 1))
    for _ in range(4):
        model.step()
    assert not everything.output_ids and first.finished_in_step is None
    finish(model, first, everything)
    assert sum(c.evictions["admission"] for c in counters(model)) >= 2
    model.drain(100)


@pytest.mark.parametrize("victim", ["first", "second"])
def test_a_reader_that_is_aborted_leaves_the_document_to_the_others(victim):
    model = ProtocolModel(1, 2, 64, 4, chunk_tokens=64)
    first = ask(model, max_new=60)
    steps_until(model, decodes(first))
    second = ask(model, max_new=50)
    steps_until(model, decodes(second))
    gone, stays = (first, second) if victim == "first" else (second, first)
    model.homes[0].abort(gone)
    third = ask(model)
    finish(model, third)
    assert num_cached(model) == 2 * 48 and stays.finished_in_step is None
    model.drain(200)


def test_a_flush_while_a_document_is_read_leaves_what_is_read():
    model = ProtocolModel(1, 2, 64, 4, chunk_tokens=64)
    first = ask(model, max_new=60)
    steps_until(model, decodes(first))
    second = ask(model, max_new=4)
    finish(model, second)
    before = num_retained(model)
    model.homes[0].participant.release_retained()
    model.step()
    assert 0 < num_retained(model) < before
    model.drain(200)
    assert num_retained(model) == 0


def test_readers_that_outgrow_the_pools_yield_and_start_over():
    model = ProtocolModel(3, 2, 28, 4, chunk_tokens=64)
    first = ask(model, max_new=40)
    steps_until(model, decodes(first))
    others = [ask(model, max_new=90, more=10), ask(model, max_new=90, more=10)]
    finish(model, first, *others)
    assert sum(home.num_retractions for home in model.homes) > 0 and borrows(model) > 2
    model.drain(300)


def test_a_pinned_degree_shares_what_lies_on_as_many_shards():
    model = ProtocolModel(1, 3, 32, 4, chunk_tokens=64)
    first = ask(model, max_new=60, shards=(1, 2, 0))
    steps_until(model, decodes(first))
    finish(model, ask(model, shards=(2, 1, 0)))
    assert num_cached(model) == 48
    finish(model, ask(model, shards=(1, 0)))
    assert num_cached(model) == 48, "degree 2 was asked for"
    model.drain(100)


def read_at_random(model, documents):
    """Somebody asks about a document, or goes on about one, or aborts."""
    choose = model.random
    home = choose.randrange(model.num_instances)
    shards = tuple(choose.sample(range(model.num_instances), choose.randint(1, model.num_instances)))
    done = [req for req in model.homes[home].done[-6:] if req.was_managed]
    if done and choose.random() < 0.3:
        req = choose.choice(done)
        length = len(req.full_untruncated_fill_ids)
        if length < 100:
            more = choose.randint(0, 9) if choose.random() < 0.6 else -choose.randint(1, length // 2)
            model.next_turn(req, home, more, choose.randint(1, 20), shards, flexible=choose.random() < 0.8)
            return
    document = choose.choice(documents)
    own = [model.num_requests + 1] * choose.randint(1, 14)
    model.arrive(home, [*document, *own], choose.randint(1, 30), shards, flexible=choose.random() < 0.8)


def test_a_walk_of_readers():
    """Every row reads the K/V of its own tokens, every page has one owner after every step, and everybody gets an answer."""
    for seed, shape in enumerate([(2, 40, 4), (3, 30, 4), (2, 24, 8)]):
        settings = {"cache_fraction": (0.9, 1.0, 0.5)[seed], "max_guest_fraction": (1.0, 0.5, 1.0)[seed]}
        model = ProtocolModel(seed, *shape, chunk_tokens=32, **settings)
        # Two of them begin alike.
        documents = [[9_000] * 30, [9_000] * 16 + [9_001] * 30, [9_002] * 41]
        for _ in range(900):
            if model.random.random() < 0.25 and sum(len(home.waiting_queue) for home in model.homes) < 6:
                read_at_random(model, documents)
            if model.random.random() < 0.02:
                model.abort_at_random()
            model.step()
        model.drain(20_000)
        assert borrows(model) > 30
        assert sum(c.hits - c.borrows for c in counters(model)) > 3
        assert sum(sum(c.evictions.values()) for c in counters(model)) > 15
        for home in model.homes:
            retained = home.participant.table.retained
            assert not retained.readers._base and not retained.readers._retained and not +retained.readers._running
            assert retained.pages == retained.evictable == [0] * model.num_instances
            assert not home.participant.homes.retained.readers and not home.participant.homes.retained.names
            assert not home.participant.guests._borrowed and home.participant.homes.borrowed_here == 0
