"""A prompt longer than any one pool is answered, wherever its key lies; stock with the same pools refuses it (test_stock_serving)."""

import random
from concurrent.futures import ThreadPoolExecutor

import pytest

from support.dyncp_grid import INSTANCES, POOL_TOKENS, grid_server
from support.recall import MODEL_NAMES, depth_at, recall_prompt

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
