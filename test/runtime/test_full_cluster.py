"""A cluster with no room: requests wait, or get 503 where the queue has a limit; those who are served get the same answers."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from testing.client import Client, RequestFailed
from testing.recall import random_ids
from testing.server import Server, ServerConfig

NUM_REQUESTS = 12
CONFIG = ServerConfig(
    "qwen3moe", 2, pool_tokens=1024, page_size=16, chunk_tokens=256, dyncp=True, flags=("--enable-metrics", "--max-queued-requests", "1")
)


def ask(client: Client, number: int, *, stream: bool) -> tuple[int, ...] | int:
    """Output ids, or the status of a refusal."""
    ids, sampling = random_ids(1200, seed=number), {"ignore_eos": True, "custom_params": {"dyncp": {"degree": 2}}}
    try:
        if not stream:
            return client.generate(ids, max_new_tokens=24, sampling=sampling).ids
        with client.stream(ids, max_new_tokens=24, sampling=sampling) as events:
            return tuple(list(events.events())[-1]["output_ids"])
    except RequestFailed as failure:
        return failure.status


def test_beyond_the_queue_is_503(serve: Callable[[ServerConfig], Server]) -> None:
    """Each request needs more than half of both pools, so they run one by one."""
    client = serve(CONFIG).client
    with ThreadPoolExecutor(NUM_REQUESTS) as executor:
        answers = list(executor.map(lambda number: ask(client, number, stream=number % 2 == 1), range(NUM_REQUESTS)))
    for parity in (0, 1):
        assert 503 in answers[parity::2], answers
    served = [number for number, answer in enumerate(answers) if isinstance(answer, tuple)]
    assert served, "nobody was served"
    assert all(answer == 503 for answer in answers if not isinstance(answer, tuple)), answers
    for number in served:
        assert ask(client, number, stream=False) == answers[number]
