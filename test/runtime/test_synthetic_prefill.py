"""SGLANG_DYNCP_BENCHMARK=1: prompts are placed, reserved and chunked as ever, but not computed; decoding goes on from noise."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from testing.client import RequestFailed
from testing.recall import random_ids
from testing.server import Server, ServerConfig

ENVIRONMENT = (("SGLANG_DYNCP_BENCHMARK", "1"), ("SGLANG_DYNCP_CHECK_EVERY_STEP", "1"))
CONFIG = ServerConfig("qwen3moe", 2, pool_tokens=1024, chunk_tokens=256, dyncp=True, environment=ENVIRONMENT)


@pytest.mark.server
@pytest.mark.on_server(CONFIG)
def test_long_prompts_decode_from_noise(serve: Callable[[ServerConfig], Server]) -> None:
    client = serve(CONFIG).client
    jobs = [(1600, 40), (30, 60), (500, 20), (64, 50)]

    def ask(job: tuple[int, int]):
        return client.generate(random_ids(job[0], seed=sum(job)), max_new_tokens=job[1], sampling={"ignore_eos": True})

    with ThreadPoolExecutor(len(jobs)) as pool:
        answers = list(pool.map(ask, jobs))
    assert [len(answer.ids) for answer in answers] == [new for _, new in jobs]
    shards = answers[0].meta["dyncp"]["shards"]
    assert len(shards) == 2 and sum(shard["tokens"] for shard in shards) == 1600 + 39
    assert len({token for answer in answers for token in answer.ids}) > 1

    with pytest.raises(RequestFailed, match="SGLANG_DYNCP_BENCHMARK"):
        client.generate(random_ids(20, seed=1), max_new_tokens=2, logprobs=True)
