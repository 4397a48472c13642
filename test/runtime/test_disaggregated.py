"""Requests whose prompts a stock prefill server computes and whose K/V it writes to the pools of two decode instances, over TCP."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import pytest

from sglang_dcp.observe.report_client import LOAD_ROUTE
from testing.client import Answer, RequestFailed
from testing.comparison import Comparison, compare
from testing.disaggregation import DECODE_WAITS_S, PREFILL_WAITS_S, Pair, decode_server, prefill_server, running_pair
from testing.dyncp_grid import GROWING, PROMPTS
from testing.recall import random_ids, recall_prompt
from testing.server import ServerPool
from testing.stock_answers import FOREVER, StockAnswers

MODEL, POOL = "qwen3moe", 512
DECODE = decode_server(MODEL, 2, POOL)
pytestmark = pytest.mark.on_server(DECODE)
TOLERANCE = 1e-4
LONGEST = 2 * POOL - 64


@pytest.fixture(scope="module")
def pair(pool: ServerPool, stock_answers: StockAnswers) -> Iterator[Pair]:
    pytest.importorskip("mooncake.engine", reason="Mooncake, or Debian's libibverbs1 that it loads, is not installed", exc_type=ImportError)
    stock_answers.of(MODEL)  # its server ends before these two start
    with running_pair(pool, prefill_server(MODEL), DECODE) as found:
        yield found


def compare_output(stock: Answer, ours: Answer) -> Comparison:
    """A decode server scores no prompt."""
    return compare(replace(stock, prompt_tokens=()), replace(ours, prompt_tokens=()))


def test_answers_are_those_of_one_large_pool(pair: Pair, stock_answers: StockAnswers) -> None:
    """Degrees 1 and 2, prompts beyond a decode pool among them, both instances busy."""
    asked = zip(PROMPTS, stock_answers.of(MODEL).prompts, strict=True)
    jobs = [(prompt, stock) for prompt, stock in asked if len(prompt.text) <= LONGEST]

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
        assert len(answer.meta["dyncp"]["shards"]) == degree
    assert max(one.worst for one in compared) < TOLERANCE
    assert max(answer.meta["prompt_tokens"] for _, answer in answers) > 1.5 * POOL
    assert sum(len(answer.output_tokens) for _, answer in answers) - sum(one.num_skipped for one in compared) > len(jobs)


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


def assert_drained(pair: Pair, limit_s: float = 60.0) -> None:
    """Every page is back, on every instance."""
    deadline = time.monotonic() + limit_s
    while not pair.decode.client.flush_cache():
        assert time.monotonic() < deadline, "the decode server never fell idle"
        time.sleep(0.2)
    loads = pair.decode.client.json("GET", LOAD_ROUTE)["instances"]
    assert [(load["kv_tokens"], load["guest_tokens"], load["queued"]) for load in loads] == [(0, 0, 0)] * 2


def wait_for_state(pair: Pair, state: str, limit_s: float = 60.0) -> None:
    """Until a request of the decode server is in it: "arriving" when the prefill server knows its pages, then "running"."""
    deadline = time.monotonic() + limit_s
    while not any(entry["state"] == state for entry in pair.decode.client.json("GET", LOAD_ROUTE)["longest"]):
        assert time.monotonic() < deadline, f"no request is {state}"
        time.sleep(0.1)


def outcome(asked: Future[Answer]) -> str | int:
    """How the request ended: its reason, or the status of the error."""
    error = asked.exception()
    if error is None:
        return asked.result().finish_reason
    assert isinstance(error, RequestFailed), error
    return error.status


def ask_forsaken(pair: Pair, pool: ThreadPoolExecutor) -> list[Future[Answer]]:
    """Two sharded requests that nobody will write the K/V of: one was aborted at its prefill server alone, one never came there."""
    ids, sharded = random_ids(40, seed=1), {"custom_params": {"dyncp": {"degree": 2}}}
    aborted = pair.drop_at_prefill(ids, rid="aborted-")
    asked = [pool.submit(pair.decode.client.generate, ids, sampling=sharded, **address) for address in (aborted, pair.address())]
    wait_for_state(pair, "arriving")
    return asked


def test_aborts_before_during_and_after_the_transfer_give_every_page_back(pair: Pair) -> None:
    """Among requests whose prefill server forsakes them, without a word to the decode server: they end at its time limit."""
    assert pair.decode.client.timeout_s > PREFILL_WAITS_S + DECODE_WAITS_S
    rng = random.Random(11)
    jobs = [(rng.choice((20, 200, 450, 780)), rng.randrange(2, 40)) for _ in range(60)]
    with ThreadPoolExecutor(20) as pool, ThreadPoolExecutor(2) as others:
        forsaken = ask_forsaken(pair, others)
        asked = []
        for index, (prompt, new) in enumerate(jobs):
            ids, rid = random_ids(prompt, seed=index), f"job-{index}-"
            asked.append(pool.submit(pair.generate, ids, max_new_tokens=new, sampling=FOREVER, rid=rid))
            if index % 5 == 4:
                time.sleep(rng.random() * 0.4)
                pair.abort(f"job-{index - rng.randrange(3)}-")
        ends = [outcome(future) for future in asked]
        assert [outcome(future) for future in forsaken] == [503, 503]
    assert all("timed out" in str(future.exception()) for future in forsaken)
    assert set(ends) <= {"length", "abort", 503}
    assert len(jobs) * 0.8 <= ends.count("length") < len(jobs)
    assert_drained(pair)


def test_a_prefill_server_that_dies_takes_its_requests_alone(pair: Pair) -> None:
    """Last: what has its K/V goes on, what waits for it gets HTTP 503, and nothing is left behind."""
    text = recall_prompt(600, 0.4, 3).text
    alone = pair.generate(text, max_new_tokens=200, logprobs=True, sampling=FOREVER)
    with ThreadPoolExecutor(8) as pool:
        decoding = pool.submit(pair.generate, text, max_new_tokens=200, logprobs=True, sampling=FOREVER)
        wait_for_state(pair, "running")
        waiting = [pool.submit(pair.generate, random_ids(900, seed=index), max_new_tokens=8) for index in range(6)]
        time.sleep(0.3)
        pair.prefill.kill()
        ends = [outcome(future) for future in waiting]
        assert compare_output(alone, decoding.result()).worst < TOLERANCE
    assert 503 in ends and set(ends) <= {"length", 503}
    assert_drained(pair)
    pair.decode.client.generate(random_ids(50, seed=1), max_new_tokens=4, bootstrap_host="2.2.2.2", bootstrap_room=1)
    assert pair.decode.is_alive
