"""Later turns of sharded conversations: what was computed is not computed again, and the answers are those of one large pool."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from testing.client import RequestFailed
from testing.comparison import first_tie
from testing.conversations import OUTPUT_TOKENS, ask, words
from testing.dyncp_grid import INSTANCES, POOL_TOKENS, grid_server

POINTS = [("qwen3moe", 64, 256), ("deepseek_v2", 16, 64)]
RETAINING = ("--dyncp-cache-fraction", "0.8", "--dyncp-cache-min-tokens", "64")


def retaining_server(*point):
    """One of the grid that keeps what its tests leave behind."""
    server = grid_server(*point)
    return dataclasses.replace(server, flags=(*server.flags, *RETAINING))


def whole_pages(earlier_ids, answer, ids, page_size):
    """Tokens of the match with an earlier turn: the last token of an answer is never stored, that of a prompt must be computed."""
    stored = [*earlier_ids, *answer.ids[:-1]]
    same = next((i for i, (a, b) in enumerate(zip(stored, ids, strict=False)) if a != b), min(len(stored), len(ids)))
    return min(same, len(ids) - 1) // page_size * page_size


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
    assert client.flush_cache()
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
    page_size, client = point[1], serve(retaining_server(*point)).client
    ids, _ = conversations(point[0])[1].turns[1]
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
    ask(client, ids, 2)
    assert ask(client, ids, 2, extra_key="tenant").meta["cached_tokens"] == 0
    assert ask(client, ids, 2).meta["cached_tokens"] > 0
    assert client.flush_cache()
    assert ask(client, ids, 2).meta["cached_tokens"] == 0


def test_a_salt_is_a_namespace_of_its_own(serve, point):
    client, ids = serve(retaining_server(*point)).client, words(500, 78)
    assert client.flush_cache()  # so that nothing has to go while both are kept
    ask(client, ids, 2)
    assert ask(client, ids, 2, cache_salt="tenant").meta["cached_tokens"] == 0
    assert ask(client, ids, 2, cache_salt="tenant").meta["cached_tokens"] > 0


def test_a_turn_grows_behind_what_it_took_over(serve, point):
    """Over several pages, so that tokens land on pages that nobody asked for at the start."""
    client, ids, num_tokens = serve(retaining_server(*point)).client, words(500, 91), 3 * point[1] + 5
    first = ask(client, ids, 2)
    longer = [*ids, *first.ids, *words(30, 92)]
    warm = ask(client, longer, 2, num_tokens=num_tokens)
    assert warm.meta["cached_tokens"] == whole_pages(ids, first, longer, point[1]) > 0
    cold = ask(client, longer, 2, num_tokens=num_tokens, extra_key="nobody else grows")
    assert cold.meta["cached_tokens"] == 0
    assert_equal(cold, warm)
    later = [*longer, *warm.ids, *words(30, 93)]
    assert ask(client, later, 2).meta["cached_tokens"] == whole_pages(longer, warm, later, point[1])


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
    assert any(ours[1].meta["cached_tokens"] for ours in answers)
    assert server.is_alive


def test_an_abort_in_a_later_turn_gives_everything_back(serve, point):
    client, ids = serve(retaining_server(*point)).client, words(700, 55)
    first = ask(client, ids, 2)
    longer = [*ids, *first.ids, *words(200, 56)]
    with ThreadPoolExecutor(1) as pool:
        pin = {"custom_params": {"dyncp": {"degree": 2, "home": 0}}, "ignore_eos": True}
        running = pool.submit(client.generate, longer, max_new_tokens=300, sampling=pin, rid="to be ended")
        time.sleep(1.0)
        client.abort("to be ended")
        with contextlib.suppress(RequestFailed):
            running.result()
    assert ask(client, longer, 2).meta["completion_tokens"] == OUTPUT_TOKENS
    assert client.flush_cache()
