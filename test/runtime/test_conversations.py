"""Later turns of sharded conversations: what was computed is not computed again, and the answers are those of one large pool."""

from __future__ import annotations

import contextlib
import dataclasses
from concurrent.futures import ThreadPoolExecutor
from uuid import uuid4

import pytest

from testing.comparison import first_tie
from testing.conversations import OUTPUT_TOKENS, ask, whole_pages, words
from testing.drained import flush
from testing.dyncp_grid import INSTANCES, POOL_TOKENS, grid_server
from testing.live_load import loads, states
from testing.waiting import wait_until

POINTS = [("qwen3moe", 64, 256), ("deepseek_v2", 16, 64)]
RETAINING = ("--dyncp-cache-fraction", "1.0", "--dyncp-cache-min-tokens", "64")


def retaining_server(*point):
    """One of the grid that keeps what its tests leave behind."""
    server = grid_server(*point)
    return dataclasses.replace(server, flags=(*server.flags, *RETAINING))


def assert_equal(stock, ours):
    end = first_tie(stock.output_tokens)
    assert ours.ids[:end] == stock.ids[:end]
    worst = max((abs(a.logprob - b.logprob) for a, b in zip(stock.output_tokens[:end], ours.output_tokens[:end], strict=True)), default=0)
    assert worst < 1e-4


@pytest.fixture
def conversations(stock_answers):
    """By model."""
    return lambda model: stock_answers.of(model).conversations


@pytest.fixture(params=[pytest.param(point, marks=pytest.mark.on_server(retaining_server(*point))) for point in POINTS])
def point(request):
    return request.param


def test_turns_go_on_where_the_last_one_ended(serve, conversations, point):
    talks = conversations(point[0])
    client = serve(retaining_server(*point)).client
    flush(client)
    for talk, degree in zip(talks, (1, 2, 4), strict=False):
        earlier = None
        for ids, stock in talk.turns:
            answer = ask(client, ids, degree, home=degree - 1)
            assert_equal(stock, answer)
            assert len(answer.meta["dyncp"]["shards"]) == degree
            expected = 0 if earlier is None else whole_pages(*earlier, ids, point[1])
            assert answer.meta["cached_tokens"] == expected
            earlier = ids, answer


def test_branches_page_ends_and_repeats(serve, conversations, point):
    page_size, (ids, _) = point[1], conversations(point[0])[1].turns[1]  # stock's server ends before this one starts
    client = serve(retaining_server(*point)).client
    flush(client)
    ids = ids[: 6 * page_size + 1 - OUTPUT_TOKENS] if len(ids) > 6 * page_size else ids
    first = ask(client, ids, 2)
    cached = []
    # The same again; one that ends on a page; one that leaves it before its end.
    for prompt in (ids, ids[: len(ids) // page_size * page_size], [*ids[: 4 * page_size + 3], *words(40, 9)]):
        expected = whole_pages(ids, first, prompt, page_size)
        answer = ask(client, prompt, 2)
        cached.append(answer.meta["cached_tokens"])
        assert cached[-1] == expected > 0
        cold = ask(client, prompt, 2, extra_key=f"nobody else {len(cached)}")
        assert cold.meta["cached_tokens"] == 0
        assert_equal(cold, answer)
        ids, first = prompt, answer


def test_a_namespace_and_a_flush_keep_a_prefix_from_being_found(serve, point):
    client, ids = serve(retaining_server(*point)).client, words(500, 77)
    flush(client)  # so that nothing has to go while both are kept
    ask(client, ids, 2)
    assert ask(client, ids, 2, extra_key="tenant").meta["cached_tokens"] == 0
    assert ask(client, ids, 2).meta["cached_tokens"] > 0
    flush(client)
    assert ask(client, ids, 2).meta["cached_tokens"] == 0


def test_a_salt_is_a_namespace_of_its_own(serve, point):
    client, ids = serve(retaining_server(*point)).client, words(500, 78)
    flush(client)
    ask(client, ids, 2)
    assert ask(client, ids, 2, cache_salt="tenant").meta["cached_tokens"] == 0
    assert ask(client, ids, 2, cache_salt="tenant").meta["cached_tokens"] > 0


def test_a_turn_grows_behind_what_it_took_over(serve, point):
    """Over several pages, so that tokens land on pages that nobody asked for at the start."""
    client, ids, num_tokens = serve(retaining_server(*point)).client, words(500, 91), 3 * point[1] + 5
    flush(client)
    first = ask(client, ids, 2)
    longer = [*ids, *first.ids, *words(30, 92)]
    warm = ask(client, longer, 2, num_tokens=num_tokens)
    assert warm.meta["cached_tokens"] == whole_pages(ids, first, longer, point[1]) > 0
    later = [*longer, *warm.ids, *words(30, 93)]
    assert ask(client, later, 2).meta["cached_tokens"] == whole_pages(longer, warm, later, point[1])
    cold = ask(client, longer, 2, num_tokens=num_tokens, extra_key="nobody else grows")  # which may cost the others their place
    assert cold.meta["cached_tokens"] == 0
    assert_equal(cold, warm)


def test_ten_conversations_over_pools_for_three(serve, conversations, point):
    """All at once, with evictions by whoever comes; every answer is stock's, and the audit finds every page in every step."""
    talks = conversations(point[0])[3:]
    assert sum(len(talk.turns[1][0]) for talk in talks) > 2 * INSTANCES * POOL_TOKENS
    server = serve(retaining_server(*point))

    def talk_to(index):
        return [ask(server.client, ids, 2 + index % 3, home=index % INSTANCES) for ids, _ in talks[index].turns]

    with ThreadPoolExecutor(5) as pool:
        answers = list(pool.map(talk_to, range(len(talks))))
    for talk, ours in zip(talks, answers, strict=True):
        for (_, stock), answer in zip(talk.turns, ours, strict=True):
            assert_equal(stock, answer)
    (first, _), (second, _), *_ = talks[0].turns  # alone, for who comes between two turns of a crowd is up to time
    ask(server.client, first, 2)
    assert ask(server.client, second, 2).meta["cached_tokens"] >= len(first) // point[1] * point[1] > 0
    assert server.is_alive


def assert_all_is_free_or_retained(client):
    def is_quiet():
        told = loads(client)
        return not any(load["home_requests"] or load["guest_tokens"] for load in told) and all(
            load["kv_tokens"] == load["retained_tokens"] for load in told
        )

    wait_until(is_quiet, "some pages are neither free nor retained")


@contextlib.contextmanager
def crowded(client, *sizes, num_tokens=400, pinned=True):
    """Others hold pages on all instances, and decode. Not pinned, they evict nothing while free pages will do."""
    with contextlib.ExitStack() as streams:
        for number, size in enumerate(sizes):
            rid = uuid4().hex
            streams.callback(client.abort, rid)  # one that its client leaves goes on for two seconds, and may come to its end
            pin = {"custom_params": {"dyncp": {"degree": INSTANCES, "home": INSTANCES - 1 - number}}} if pinned else {}
            sampling = {"ignore_eos": True} | pin
            stream = streams.enter_context(client.stream(words(size, 200 + number), max_new_tokens=num_tokens, sampling=sampling, rid=rid))
            next(stream.events())
        yield


def test_a_turn_that_is_aborted_while_it_decodes_gives_everything_back(serve, conversations, point):
    (ids, _), (longer, stock), (last, last_stock), _ = conversations(point[0])[1].turns
    client = serve(retaining_server(*point)).client
    flush(client)
    first, pin = ask(client, ids, 2), {"ignore_eos": True, "custom_params": {"dyncp": {"degree": 2, "home": 0}}}
    with client.stream(longer, max_new_tokens=900, sampling=pin, rid="ends as it decodes") as stream:
        events = stream.events()
        assert next(events)["meta_info"]["cached_tokens"] == whole_pages(ids, first, longer, point[1]) > 0
        client.abort("ends as it decodes")
        assert list(events)[-1]["meta_info"]["finish_reason"]["type"] == "abort"
    assert_all_is_free_or_retained(client)
    again = ask(client, longer, 2)
    assert_equal(stock, again)
    answer = ask(client, last, 2)
    assert_equal(last_stock, answer)
    assert (again.meta["cached_tokens"], answer.meta["cached_tokens"]) == (0, whole_pages(longer, again, last, point[1]))


def test_a_turn_that_is_aborted_while_it_waits_leaves_the_last_one_as_it_was(serve, conversations, point):
    (ids, _), (longer, stock), *_ = conversations(point[0])[1].turns
    client = serve(retaining_server(*point)).client
    flush(client)
    first = ask(client, ids, 2)
    assert_all_is_free_or_retained(client)
    retained = [load["retained_tokens"] for load in loads(client)]
    # A name of its own: SGLang aborts what it has streamed once more, by name, two seconds later.
    with crowded(client, 1200, 1200), ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(ask, client, [*longer, *words(700, 56)], 2, rid="ends as it waits")
        wait_until(lambda: ("ends as it waits", "waiting") in states(client), "it does not wait")
        client.abort("ends as it waits")
        ended = waiting.result().meta
        assert (ended["finish_reason"]["type"], ended["completion_tokens"]) == ("abort", 0)
    assert_all_is_free_or_retained(client)
    assert [load["retained_tokens"] for load in loads(client)] == retained
    answer = ask(client, longer, 2)
    assert_equal(stock, answer)
    assert answer.meta["cached_tokens"] == whole_pages(ids, first, longer, point[1]) > 0


def test_a_turn_that_is_retracted_starts_over_and_leaves_its_answer_to_the_next(serve, conversations, point):
    """The older request and the turn, which has taken over the pages of the last one, grow until no page is left: the younger one yields.
    Nothing is pinned behind the first turn: where a pinned one may lie would depend on what the router has been told by then."""
    (ids, _), (longer, stock), (last, last_stock), _ = conversations(point[0])[2].turns
    client, page_size = serve(retaining_server(*point)).client, point[1]
    flush(client)
    ask(client, ids, INSTANCES)
    assert_all_is_free_or_retained(client)
    retained = [load["retained_tokens"] for load in loads(client)]
    free = max(5 * page_size, 128)
    with crowded(client, INSTANCES * POOL_TOKENS - len(longer) - free, num_tokens=free + page_size, pinned=False):
        assert [load["retained_tokens"] for load in loads(client)] == retained
        answer = ask(client, longer, num_tokens=max(4 * page_size, 96))
    assert answer.meta["num_retractions"] == 1
    assert_equal(stock, answer)
    assert_all_is_free_or_retained(client)
    later = ask(client, last)
    assert_equal(last_stock, later)
    assert later.meta["cached_tokens"] == whole_pages(longer, answer, last, page_size)


def test_questions_to_one_document_are_answered_at_once_from_one_copy(serve, point):
    """The second while the first decodes, the third and the fourth together while the second does: each computes its own tokens alone."""
    client, document, page_size = serve(retaining_server(*point)).client, words(500, 94), point[1]
    flush(client)
    questions = [[*document, *words(30 + 7 * number, 300 + number)] for number in range(4)]
    with ThreadPoolExecutor(4) as pool:
        asked = []
        for number, num_tokens in enumerate((150, 90, OUTPUT_TOKENS, OUTPUT_TOKENS)):
            asked.append(pool.submit(ask, client, questions[number], 2, num_tokens=num_tokens, rid=f"question {number}"))
            if number < 2:
                wait_until(lambda: (f"question {number}", "running") in states(client), "it does not decode")  # noqa: B023
        answers = [waiting.result() for waiting in asked]
    assert [answer.meta["cached_tokens"] for answer in answers] == [0, *[len(document) // page_size * page_size] * 3]
    assert_all_is_free_or_retained(client)
    assert sum(load["retained_tokens"] for load in loads(client)) < 2 * len(document), "more than one copy is kept"
    for question, warm, num_tokens in zip(questions, answers, (150, 90, OUTPUT_TOKENS, OUTPUT_TOKENS), strict=True):
        cold = ask(client, question, 2, num_tokens=num_tokens, extra_key="nobody else")
        assert_equal(cold, warm)
        flush(client)


def test_a_question_to_a_document_that_is_being_computed_waits_for_it(serve, point):
    client, document, page_size = serve(retaining_server(*point)).client, words(1_500, 95), point[1]
    flush(client)
    with ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(ask, client, [*document, *words(20, 400 + number)], 4, num_tokens=20) for number in range(3)]
        cached = sorted(waiting.result().meta["cached_tokens"] for waiting in asked)
    assert cached == [0, *[len(document) // page_size * page_size] * 2]
    assert_all_is_free_or_retained(client)
