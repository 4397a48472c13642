"""A decode server without prefill servers (--disaggregation-transfer-backend fake): requests come with K/V that nobody computed, placed,
reserved and sharded as ever. Their answers mean nothing; what is looked at is that all of them end, and where their pages are."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from testing.client import Answer, RequestFailed
from testing.drained import assert_all_free
from testing.live_load import states
from testing.recall import random_ids
from testing.server import Server, ServerConfig
from testing.stock_answers import FOREVER
from testing.waiting import wait_until

POOL = 1024
FLAGS = ("--disaggregation-mode", "decode", "--disaggregation-transfer-backend", "fake", "--enable-metrics")
CONFIG = ServerConfig("qwen3moe", 2, pool_tokens=POOL, dyncp=True, flags=FLAGS, environment=(("SGLANG_DYNCP_CHECK_EVERY_STEP", "1"),))
pytestmark = pytest.mark.on_server(CONFIG)


@pytest.fixture
def server(serve: Callable[[ServerConfig], Server]) -> Server:
    return serve(CONFIG)


def ask(server: Server, prompt: int, new: int, **fields: object) -> Answer:
    return server.client.generate(random_ids(prompt, seed=prompt + new), max_new_tokens=new, sampling=FOREVER, **fields)


def assert_drained(server: Server) -> None:
    assert_all_free(server.client, 2, limit_s=30.0)


def test_long_prompts_are_decoded_over_both_pools(server: Server) -> None:
    """The short ones stay whole beside the long one, for both pools have room for them: the second runs before the others come, as one that
    waits may be given pages elsewhere; the third comes when the long one has made room."""
    jobs = [(1600, 40), (30, 60), (500, 20), (64, 50), (9, 1)]
    with ThreadPoolExecutor(len(jobs)) as pool:
        asked = {jobs[1]: pool.submit(ask, server, *jobs[1], rid="runs first")}
        wait_until(lambda: ("runs first", "running") in states(server.client), "it does not run")
        asked |= {job: pool.submit(ask, server, *job) for job in (jobs[0], *jobs[3:])}
        asked[jobs[0]].result()
        asked[jobs[2]] = pool.submit(ask, server, *jobs[2])
        answers = [asked[job].result() for job in jobs]
    assert [len(answer.ids) for answer in answers] == [new for _, new in jobs]
    shards = answers[0].meta["dyncp"]["shards"]
    assert len(shards) == 2 and sum(shard["tokens"] for shard in shards) == 1600 + 39
    assert answers[1].meta["dyncp"]["degree_end"] == 1
    assert_drained(server)


def test_a_request_of_one_token_ends_in_the_step_in_which_its_pages_came(server: Server) -> None:
    """It is gone before the next look at who waits for pages, which once gave them back a second time and ended the server."""
    for home in (0, 1):
        pin = {"custom_params": {"dyncp": {"degree": 2, "home": home}}}
        answer = server.client.generate(random_ids(300, seed=home), max_new_tokens=1, sampling=FOREVER | pin)
        assert len(answer.ids) == 1 and answer.meta["dyncp"]["degree_end"] == 2
    assert_drained(server)


def test_a_full_cluster_parks_and_prefills_again(server: Server) -> None:
    """Three requests that need more than both pools hold: one is sent back to where it was prefilled, and all get their tokens."""
    jobs = [(300, 560), (301, 540), (302, 550), (40, 30)]
    with ThreadPoolExecutor(len(jobs)) as pool:
        answers = list(pool.map(lambda job: ask(server, *job), jobs))
    assert [len(answer.ids) for answer in answers] == [new for _, new in jobs]
    assert max(answer.meta["dyncp"]["degree_end"] for answer in answers) == 2
    assert_drained(server)


def reason_of(asked: Future[Answer]) -> str:
    """An abort of a request that has no K/V yet is an error to its client."""
    error = asked.exception()
    if error is None:
        return asked.result().finish_reason
    assert isinstance(error, RequestFailed) and error.status == 503, error
    return "abort"


def test_aborts_give_every_page_back(server: Server) -> None:
    """Some wait for pages when they are aborted, some have just got them, some run."""
    rng = random.Random(5)
    jobs = [(rng.choice((20, 200, 700, 1300)), rng.randrange(2, 60)) for _ in range(48)]
    with ThreadPoolExecutor(len(jobs)) as pool:
        asked = [pool.submit(ask, server, *job, rid=f"job-{index}-") for index, job in enumerate(jobs)]
        for index in range(0, len(jobs), 4):
            time.sleep(rng.random() * 0.3)
            server.client.abort(f"job-{index}-")
        reasons = [reason_of(future) for future in asked]
    kept = [index for index in range(len(jobs)) if index % 4]
    assert {reasons[index] for index in kept} == {"length"}
    assert "abort" in reasons and set(reasons) <= {"abort", "length"}
    assert_drained(server)
