"""Degree that moves while decoding: growth, shortage, sitting out, retraction, abort, flush. Pools of 256 tokens."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sglang_dcp.observe.report_client import LOAD_ROUTE, ROUTE
from testing.comparison import assert_same_until_tie, first_tie
from testing.drained import assert_drained
from testing.dyncp_grid import GROWING, small_pool_server
from testing.live_load import loads, states
from testing.recall import model_path, recall_prompt
from testing.stock_answers import FOREVER
from testing.waiting import wait_until

POOL = 256
SERVER = small_pool_server(POOL)
pytestmark = pytest.mark.on_server(SERVER)


@pytest.fixture
def server(serve):
    return serve(SERVER)


@pytest.fixture
def stock_tokens(stock_answers):
    """Stock's greedy output of the growth prompts, with gaps."""
    return stock_answers.of(SERVER.model).growing


def test_degree_grows_while_decoding(stock_tokens, server):
    for (prompt, count), stock in list(zip(GROWING, stock_tokens, strict=True))[:1]:
        answer = server.client.generate(prompt.text, max_new_tokens=count, logprobs=True, sampling=FOREVER)
        assert len(answer.ids) == count
        assert answer.meta["dyncp"]["degree_start"] == 1
        assert answer.meta["dyncp"]["degree_end"] >= 3
        assert answer.meta.get("num_retractions", 0) == 0
        assert_same_until_tie(stock, answer)


def test_three_growing_requests_share_the_cluster(stock_tokens, server):
    """They need more than the cluster has at once: one may be sent back and starts over, all finish with stock's tokens."""
    with ThreadPoolExecutor(3) as pool:
        answers = list(
            pool.map(lambda item: server.client.generate(item[0].text, max_new_tokens=item[1], logprobs=True, sampling=FOREVER), GROWING)
        )
    for answer, stock, (_, count) in zip(answers, stock_tokens, GROWING, strict=True):
        assert len(answer.ids) == count
        assert_same_until_tie(stock, answer)


def test_abort_while_growing_gives_everything_back(server):
    prompt = recall_prompt(60, 0.3, 4)
    with ThreadPoolExecutor(3) as pool:
        running = [
            pool.submit(server.client.generate, prompt.text, max_new_tokens=850, sampling=FOREVER, rid=f"grow-{i}") for i in range(3)
        ]
        wait_until(lambda: any(int(degree) > 1 for degree in server.client.json("GET", LOAD_ROUTE)["degrees"]), "nobody grew")
        assert not server.client.flush_cache(), "a busy cluster must not be flushed"
        for i in range(3):
            server.client.abort(f"grow-{i}")
        reasons = [f.result().finish_reason for f in running]
    assert reasons == ["abort"] * 3
    assert_drained(server)


def test_disconnect_in_the_middle_of_a_sharded_prefill(server):
    for index in range(6):
        stream = server.client.stream(recall_prompt(700, 0.5, index).text, max_new_tokens=200, sampling=FOREVER)
        time.sleep(0.2 * index)
        stream.close()
    assert_drained(server)


@pytest.mark.parametrize("pins", [{}, {"custom_params": {"dyncp": {"degree": 2}}}])
def test_min_new_tokens_holds_for_a_request_that_sits_out(server, pins):
    """A lone request that outgrows its pool sits out once; it ends where one that never had to does."""
    end = json.loads((Path(model_path(SERVER.model)) / "config.json").read_text())["eos_token_id"]
    prompt = [1 + i % 90 for i in range(POOL - 50)]
    sampling = {"min_new_tokens": 80, "logit_bias": {str(end): 100.0}, "ignore_eos": False} | pins
    answer = server.client.generate(prompt, max_new_tokens=120, sampling=sampling)
    assert answer.meta["dyncp"]["degree_end"] >= 2
    assert (len(answer.ids), answer.ids[-1], answer.finish_reason) == (81, end, "stop")


def test_penalties_count_every_token_of_a_request_that_sits_out(server):
    """As for one that has two shards from the start."""
    prompt = [1 + i % 90 for i in range(POOL - 50)]
    penalties = {"frequency_penalty": 1.5, "presence_penalty": 0.7, "repetition_penalty": 1.2, **FOREVER}
    outgrows, spread = (
        server.client.generate(prompt, max_new_tokens=90, logprobs=True, sampling=penalties | pins)
        for pins in ({}, {"custom_params": {"dyncp": {"degree": 2}}})
    )
    assert (outgrows.meta["dyncp"]["degree_start"], spread.meta["dyncp"]["degree_start"]) == (1, 2)
    assert_same_until_tie(spread, outgrows)
    scored = zip(spread.output_tokens, outgrows.output_tokens, strict=True)
    for place, (a, b) in zip(range(first_tie(spread.output_tokens)), scored, strict=False):
        assert abs(a.logprob - b.logprob) < 1e-3, place


def test_a_local_request_starts_when_a_guest_leaves_its_pool(server):
    """SGLang looks at its queue again only when one of its own requests has left, which here is later. What that may still generate is
    charged: beside the guest there is no room, without it there is half as much again as the one that waits needs."""

    def start(name, length, home, degree, count):
        pin = {"custom_params": {"dyncp": {"degree": degree, "home": home}}}
        prompt = [1 + (7 * i + length) % 90 for i in range(length)]
        return pool.submit(server.client.generate, prompt, max_new_tokens=count, sampling=FOREVER | pin, rid=name)

    with ThreadPoolExecutor(3) as pool:
        runs = start("runs", 30, 1, 1, 130)
        wait_until(lambda: states(server.client) == [("runs", "running")], "it does not run")
        leaves = start("leaves", 600, 0, 4, 40)
        wait_until(lambda: loads(server.client)[1]["guest_tokens"], "nobody is a guest")
        waits = start("waits", 24, 1, 1, 8)
        assert len(waits.result().ids) == 8
        assert not runs.done(), "it waited for the one that runs in its pool"
        assert (len(leaves.result().ids), len(runs.result().ids)) == (40, 130)
    ended = {entry["rid"]: entry["time"] for entry in server.client.json("GET", ROUTE)["requests"]}
    assert ended["leaves"] < ended["waits"] < ended["runs"], "there was room beside the guest"
