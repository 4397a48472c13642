"""Requests whose prompts a stock prefill server computes and whose K/V it writes to the pools of two decode instances, over TCP."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from testing.client import Answer, RequestFailed
from testing.comparison import compare_output
from testing.conversations import OUTPUT_TOKENS, whole_pages
from testing.disaggregation import DECODE_WAITS_S, PREFILL_WAITS_S, Pair, decode_server, prefill_server, running_pair, running_router
from testing.drained import assert_all_free, flush
from testing.dyncp_grid import GROWING, PROMPTS, PinnedPrompt
from testing.live_load import states
from testing.recall import random_ids, recall_prompt
from testing.server import ServerPool
from testing.stock_answers import FOREVER, StockAnswers
from testing.transfers import hold_transfers, is_held, pages_sent, probed
from testing.waiting import wait_until

MODEL, POOL = "qwen3moe", 512
RETAINING = ("--dyncp-cache-fraction", "0.8", "--dyncp-cache-min-tokens", "64")
DECODE = decode_server(MODEL, 2, POOL, *RETAINING)
pytestmark = pytest.mark.on_server(DECODE)
TOLERANCE = 1e-4
LONGEST = 2 * POOL - 64


@pytest.fixture(scope="module")
def transfers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("transfers")


@pytest.fixture(scope="module")
def pair(pool: ServerPool, stock_answers: StockAnswers, transfers: Path) -> Iterator[Pair]:
    pytest.importorskip("mooncake.engine", reason="Mooncake, or Debian's libibverbs1 that it loads, is not installed", exc_type=ImportError)
    stock_answers.of(MODEL)  # its server ends before these two start
    with running_pair(pool, probed(prefill_server(MODEL), transfers), DECODE) as found:
        yield found


def servable(stock_answers: StockAnswers) -> list[tuple[PinnedPrompt, Answer]]:
    """The prompts that the two pools can hold, with stock's answers."""
    asked = zip(PROMPTS, stock_answers.of(MODEL).prompts, strict=True)
    return [(prompt, stock) for prompt, stock in asked if len(prompt.text) <= LONGEST]


def test_answers_are_those_of_one_large_pool(pair: Pair, stock_answers: StockAnswers, transfers: Path) -> None:
    """Degrees 1 and 2, prompts beyond a decode pool among them, both instances busy. Each page is sent once, whoever has it.

    More degrees, MLA and a prefill server without this package: benchmark.serving.disaggregated.
    """
    jobs, before = servable(stock_answers), pages_sent(transfers)

    def ask(place: int):
        prompt, stock = jobs[place]
        degree = 1 + (len(prompt.text) > POOL - 64 or place % 2)
        pin = {"custom_params": {"dyncp": {"degree": degree, "home": place % 2}}}
        answer = pair.generate(prompt.text, max_new_tokens=prompt.max_new_tokens, logprobs=True, sampling=pin)
        return degree, answer

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(ask, range(len(jobs))))
    compared = []
    for (_, stock), (degree, answer) in zip(jobs, answers, strict=True):
        compared.append(compare_output(stock, answer))
        assert answer.meta["dyncp"]["degree_start"] == degree
    assert max(one.worst for one in compared) < TOLERANCE
    assert max(answer.meta["prompt_tokens"] for _, answer in answers) > 1.5 * POOL
    assert pages_sent(transfers) - before == sum(-(-answer.meta["prompt_tokens"] // DECODE.page_size) for _, answer in answers)
    assert sum(len(answer.output_tokens) for _, answer in answers) - sum(one.num_skipped for one in compared) > len(jobs)


@pytest.mark.parametrize("degree", [2, None])
def test_a_later_turn_is_sent_its_new_pages_alone(pair: Pair, stock_answers: StockAnswers, transfers: Path, degree: int | None) -> None:
    """Four turns, the later ones beyond a decode pool; pinned, and as the router has them. Its prefill server computes what it has not."""
    flush(pair.decode.client)
    pin = {} if degree is None else {"custom_params": {"dyncp": {"degree": degree}}}
    earlier: tuple[list[int], Answer] | None = None
    for ids, stock in stock_answers.of(MODEL).conversations[0].turns:
        before = pages_sent(transfers)
        answer = pair.generate(
            ids, max_new_tokens=OUTPUT_TOKENS, return_logprob=True, top_logprobs_num=2, sampling={"ignore_eos": True} | pin
        )
        assert compare_output(stock, answer).worst < TOLERANCE
        was_sharded = earlier is not None and len(earlier[1].meta["dyncp"]["shards"]) > 1
        kept = whole_pages(*earlier, ids, DECODE.page_size) if earlier is not None and was_sharded else 0
        assert pages_sent(transfers) - before == -(-len(ids) // DECODE.page_size) - kept // DECODE.page_size
        assert answer.meta["cached_tokens"] >= kept
        earlier = ids, answer
    assert earlier is not None and len(earlier[0]) > POOL and len(earlier[1].meta["dyncp"]["shards"]) == 2


@pytest.mark.parametrize("reader_ends_first", [True, False])
def test_a_prompt_that_another_one_decodes_is_read_by_both(pair: Pair, transfers: Path, reader_ends_first: bool) -> None:
    """Its pages are sent once, and are free when both have ended."""
    text, sharded = recall_prompt(300, 0.4, 5).text, FOREVER | {"custom_params": {"dyncp": {"degree": 2, "home": 0}}}
    output_alone = {"return_logprob": True, "top_logprobs_num": 2}  # SGLang computes a prompt whose scores are asked for anew
    flush(pair.decode.client)
    alone = pair.generate(text, max_new_tokens=150, logprobs=True, sampling=sharded)
    lengths = (150, 8) if reader_ends_first else (140, 150)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(pair.generate, text, max_new_tokens=lengths[0], sampling=sharded, rid="first-", **output_alone)
        wait_for_state(pair, "running", "first-")
        before = pages_sent(transfers)
        reader = pair.generate(text, max_new_tokens=lengths[1], sampling=sharded, **output_alone)
    assert pages_sent(transfers) - before == 1, "the page behind what both read"
    for answer, new in ((first.result(), lengths[0]), (reader, lengths[1])):
        assert len(answer.ids) == new and answer.ids == alone.ids[:new]
        for token, expected in zip(answer.output_tokens, alone.output_tokens, strict=False):
            assert abs(token.logprob - expected.logprob) < TOLERANCE
    assert_drained(pair)


def test_behind_sglang_s_own_router(pair: Pair, stock_answers: StockAnswers) -> None:
    """It makes the rooms. /generate, /v1/completions and a stream at once, prompts beyond a decode pool among them."""
    pytest.importorskip("sglang_router")
    jobs = servable(stock_answers)[::3]
    sure = [(prompt, stock) for prompt, stock in jobs if all((token.top_gap or 0) > 0.01 for token in stock.output_tokens)][:3]

    def read_stream(prompt: PinnedPrompt) -> str:
        with router.stream(prompt.text, max_new_tokens=prompt.max_new_tokens) as stream:
            return str(list(stream.events())[-1]["text"])

    with running_router(pair) as router, ThreadPoolExecutor(6) as pool:
        generated = [pool.submit(router.generate, prompt.text, max_new_tokens=prompt.max_new_tokens, logprobs=True) for prompt, _ in jobs]
        completed = [pool.submit(router.complete, prompt.text, max_tokens=prompt.max_new_tokens) for prompt, _ in sure]
        streamed = [pool.submit(read_stream, prompt) for prompt, _ in sure]
    answers = [future.result() for future in generated]
    assert max(compare_output(stock, answer).worst for (_, stock), answer in zip(jobs, answers, strict=True)) < TOLERANCE
    assert {answer.meta["dyncp"]["home"] for answer in answers} == {0, 1}
    assert {len(answer.meta["dyncp"]["shards"]) for answer in answers} == {1, 2}
    texts = [stock.text for _, stock in sure]
    assert [future.result()["choices"][0]["text"] for future in completed] == texts == [future.result() for future in streamed]
    assert len(sure) == 3 and max(answer.meta["prompt_tokens"] for answer in answers) > POOL


def test_a_request_that_gives_its_pages_up_is_prefilled_again(pair: Pair, stock_answers: StockAnswers) -> None:
    """Three outputs outgrow both pools together: the youngest starts over, and all have the tokens of one large pool."""
    with ThreadPoolExecutor(len(GROWING)) as pool:
        grown = pool.map(lambda job: pair.generate(job[0].text, max_new_tokens=job[1], logprobs=True, sampling=FOREVER), GROWING)
        answers = list(grown)
    for (_, new), stock, answer in zip(GROWING, stock_answers.of(MODEL).growing, answers, strict=True):
        assert len(answer.ids) == new
        assert compare_output(stock, answer).worst < TOLERANCE
    assert max(answer.meta["dyncp"]["degree_end"] for answer in answers) == 2
    assert_drained(pair)


def assert_drained(pair: Pair) -> None:
    assert_all_free(pair.decode.client, 2)


def wait_for_state(pair: Pair, state: str, rid: str) -> None:
    """Of a request of the decode server."""
    wait_until(lambda: (rid, state) in states(pair.decode.client), f"{rid} is not {state}")


def outcome(asked: Future[Answer]) -> str | int:
    """How the request ended: its reason, or the status of the error."""
    error = asked.exception()
    if error is None:
        return asked.result().finish_reason
    assert isinstance(error, RequestFailed), error
    return error.status


def ask_forsaken(pair: Pair, pool: ThreadPoolExecutor) -> list[Future[Answer]]:
    """Two sharded requests that nobody will write the K/V of: one was aborted at its prefill server alone, one never came there."""
    aborted = pair.drop_at_prefill(random_ids(40, seed=1), rid="dropped-")
    return [ask_decode_alone(pair, pool, f"forsaken-{index}-", address) for index, address in enumerate((aborted, pair.address()))]


def ask_decode_alone(pair: Pair, pool: ThreadPoolExecutor, rid: str, address: dict[str, Any]) -> Future[Answer]:
    """A sharded request, once its pages are there and announced."""
    sharded = {"custom_params": {"dyncp": {"degree": 2}}}
    asked = pool.submit(pair.decode.client.generate, random_ids(40, seed=1), sampling=sharded, rid=rid, **address)
    wait_for_state(pair, "arriving", rid)
    return asked


def abort_in_every_state(pair: Pair, pool: ThreadPoolExecutor) -> None:
    """One request each that waits for its pages, whose K/V is on its way, and that runs. Others hold pages meanwhile."""
    arriving = ask_decode_alone(pair, pool, "arriving-", pair.address())
    ids = random_ids(60, seed=2)
    running = pool.submit(pair.generate, ids, max_new_tokens=700, sampling=FOREVER, rid="running-")
    wait_for_state(pair, "running", "running-")
    waiting = pool.submit(pair.generate, random_ids(LONGEST - 10, seed=3), rid="waiting-")
    wait_for_state(pair, "waiting", "waiting-")
    for rid in ("waiting-", "arriving-", "running-"):
        pair.abort(rid)
    assert [outcome(one) for one in (waiting, arriving, running)] == [503, 503, "abort"]


def test_aborts_before_during_and_after_the_transfer_give_every_page_back(pair: Pair) -> None:
    """Of 200 requests one in ten is aborted, at any time. Beside them are some whose prefill server forsakes them without a word to the
    decode server: they end at its time limit."""
    assert pair.decode.client.timeout_s > PREFILL_WAITS_S + DECODE_WAITS_S
    rng = random.Random(11)
    jobs = [(rng.choice((20, 40, 60, 120, 200, 700)), rng.randrange(2, 12), rng.random() * 2) for _ in range(200)]

    def ask(index: int) -> str | int:
        prompt, new, abort_after_s = jobs[index]
        rid = f"job-{index}-"
        with ThreadPoolExecutor(1) as one:
            asked = one.submit(pair.generate, random_ids(prompt, seed=index), max_new_tokens=new, sampling=FOREVER, rid=rid)
            if index % 10 == 0:
                time.sleep(abort_after_s)
                pair.abort(rid)
            return outcome(asked)

    with ThreadPoolExecutor(20) as pool, ThreadPoolExecutor(8) as others:
        forsaken = ask_forsaken(pair, others)
        abort_in_every_state(pair, others)
        ends = list(pool.map(ask, range(len(jobs))))
        assert [outcome(future) for future in forsaken] == [503, 503]
    assert all("timed out" in str(future.exception()) for future in forsaken)
    assert {end for index, end in enumerate(ends) if index % 10} == {"length"}
    assert set(ends) <= {"length", "abort", 503}
    assert_drained(pair)


def test_a_prefill_server_that_dies_in_mid_transfer_takes_its_requests_alone(pair: Pair, transfers: Path) -> None:
    """Last. It dies with one chunk sent: what has its K/V goes on, what waits for it gets HTTP 503, and nothing is left behind."""
    text, sharded = recall_prompt(200, 0.4, 3).text, {"custom_params": {"dyncp": {"degree": 2}}}
    alone = pair.generate(text, max_new_tokens=200, logprobs=True, sampling=FOREVER)
    with ThreadPoolExecutor(8) as pool:
        decoding = pool.submit(pair.generate, text, max_new_tokens=200, logprobs=True, sampling=FOREVER, rid="decoding-")
        wait_for_state(pair, "running", "decoding-")
        hold_transfers(transfers)
        waiting = [pool.submit(pair.generate, random_ids(290, seed=1), sampling=sharded, rid="long-")]
        wait_until(lambda: is_held(transfers), "the prefill server sent nothing")
        wait_for_state(pair, "arriving", "long-")
        waiting += [pool.submit(pair.generate, random_ids(20, seed=index)) for index in range(5)]
        pair.prefill.kill()
        assert [outcome(future) for future in waiting] == [503] * 6
        assert compare_output(alone, decoding.result()).worst < TOLERANCE
    assert_drained(pair)
    pair.decode.client.generate(random_ids(50, seed=1), max_new_tokens=4, bootstrap_host="2.2.2.2", bootstrap_room=1)
    assert pair.decode.is_alive
