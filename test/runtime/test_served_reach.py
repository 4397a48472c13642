"""A prompt longer than any one pool is answered, wherever its key lies; stock with the same pools refuses it (test_stock_serving)."""

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from testing.client import Client
from testing.dyncp_grid import INSTANCES, POOL_TOKENS, grid_server
from testing.recall import MODEL_NAMES, depth_at, random_ids, recall_prompt
from testing.stock_answers import FOREVER

LENGTH = 3500
NUM_LONG, NUM_SHORT = 20, 8
LEAST_RIGHT = 19


def key_positions(page_size: int) -> list[int]:
    """Both sides of every border between shards (an even split over the pools), and the middle of every shard."""
    share = LENGTH // INSTANCES // page_size * page_size
    borders = [share * i for i in range(1, INSTANCES)]
    near = [border + offset for border in borders for offset in (-12, -4, -2, 0, 3)]
    return [*near, *(share * i + share // 2 for i in range(INSTANCES)), 40][:NUM_LONG]


def long_prompts(page_size: int) -> list:
    rng = random.Random(35)
    prompts = []
    for index, position in enumerate(key_positions(page_size)):
        scatter = index % 2 == 1
        prompts.append(recall_prompt(LENGTH, rng.random() if scatter else depth_at(LENGTH, position), index, scatter=scatter))
    return prompts


@pytest.mark.timeout(900)
@pytest.mark.parametrize("model", [pytest.param(m, marks=pytest.mark.on_server(grid_server(m, 16, 256))) for m in MODEL_NAMES])
def test_long_prompts_beside_short_ones(serve, model):
    client = serve(grid_server(model, 16, 256)).client
    prompts = long_prompts(16)
    assert len(prompts) == NUM_LONG and LENGTH > 3 * POOL_TOKENS
    short = [recall_prompt(150, i / NUM_SHORT, 900 + i) for i in range(NUM_SHORT)]
    with ThreadPoolExecutor(4 + NUM_SHORT) as pool:
        beside = [pool.submit(client.generate, p.text) for p in short]
        answers = list(pool.map(lambda p: client.generate(p.text), prompts))
        right_short = sum(f.result().text == p.answer for f, p in zip(beside, short, strict=True))
    right = sum(answer.text == p.answer for answer, p in zip(answers, prompts, strict=True))
    assert right >= LEAST_RIGHT
    assert right_short == NUM_SHORT
    for answer in answers:
        assert len(answer.meta["dyncp"]["shards"]) == INSTANCES
        assert sum(shard["tokens"] for shard in answer.meta["dyncp"]["shards"]) >= LENGTH


@pytest.mark.on_server(grid_server("qwen3moe", 16, 256))
def test_eight_long_prompts_at_once_finish(serve):
    """8 x 3,500 tokens, two for each home, on pools that hold one of them: no deadlock. (Times: benchmark/serving/pressure.py.)"""
    client = serve(grid_server("qwen3moe", 16, 256)).client
    prompts = [recall_prompt(LENGTH, i / 8, 70 + i) for i in range(8)]
    pins = [{"custom_params": {"dyncp": {"home": i % INSTANCES, "degree": INSTANCES}}} for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda p, pin: client.generate(p.text, sampling=pin), prompts, pins))
    assert sum(a.text == p.answer for a, p in zip(answers, prompts, strict=True)) >= 7


@pytest.mark.on_server(grid_server("qwen3moe", 16, 256))
def test_a_long_prompt_is_not_starved_by_short_ones(serve):
    client = serve(grid_server("qwen3moe", 16, 256)).client
    done, short = [], recall_prompt(200, 0.5, 5)
    with ThreadPoolExecutor(9) as pool:

        def keep_asking(_):
            count = 0
            while not done:
                assert client.generate(short.text, max_new_tokens=24, sampling={"ignore_eos": True}).text.startswith(short.answer)
                count += 1
            return count

        stream = [pool.submit(keep_asking, i) for i in range(8)]
        try:
            prompt = recall_prompt(LENGTH, 0.4, 77)
            assert client.generate(prompt.text).text == prompt.answer
        finally:
            done.append(True)
        assert all(f.result() > 0 for f in stream)


def first_token(client: Client, rid: str, prompt: int, new: int, pin: dict[str, int] | None = None, **fields: Any) -> Iterator[Any]:
    """The events behind the first token, once that is there."""
    sampling = FOREVER | ({"custom_params": {"dyncp": pin}} if pin else {})
    events = client.stream(random_ids(prompt, seed=sum(rid.encode())), max_new_tokens=new, sampling=sampling, rid=rid, **fields).events()
    next(events)
    return events


def assert_none_had_ended(client: Client, streams: dict[str, Iterator[Any]]) -> None:
    """An abort ends only what still runs."""
    for rid in streams:
        client.abort(rid)
    reasons = {rid: list(events)[-1]["meta_info"]["finish_reason"]["type"] for rid, events in streams.items()}
    assert reasons == dict.fromkeys(streams, "abort")


@pytest.mark.on_server(grid_server("qwen3moe", 16, 256))
def test_short_prompts_with_long_outputs_start_beside_a_long_prompt(serve):
    """Sent at once to an idle cluster that has 2,500 tokens left: all of them have a first token before any has its last."""
    client = serve(grid_server("qwen3moe", 16, 256)).client
    jobs = [("long", 1500, 1200), ("short-0", 64, 900), ("short-1", 64, 900)]
    with ThreadPoolExecutor(len(jobs)) as pool:
        streams = dict(zip([rid for rid, _, _ in jobs], pool.map(lambda job: first_token(client, *job), jobs), strict=True))
    assert_none_had_ended(client, streams)


@pytest.mark.on_server(grid_server("qwen3moe", 16, 256))
def test_a_local_request_does_not_wait_for_its_pool_while_another_has_room(serve):
    """500 tokens and the output expected of both requests are more than a pool holds. The second has the same home, not by a pin."""
    client = serve(grid_server("qwen3moe", 16, 256)).client
    streams = {"fill": first_token(client, "fill", 500, 900, {"degree": 1, "home": 0})}
    streams["moved"] = first_token(client, "moved", 64, 900, routed_dp_rank=0)
    assert_none_had_ended(client, streams)
