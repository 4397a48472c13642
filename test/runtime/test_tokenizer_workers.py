"""Two tokenizer workers (--tokenizer-worker-num 2): each checks its requests, and each knows the whole server."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest

from testing.recall import VOCABULARY_SIZE, random_ids, recall_prompt
from testing.server import Server, ServerConfig

WORKERS = 2
CONFIG = ServerConfig(
    "qwen3moe",
    instances=2,
    pool_tokens=1024,
    chunk_tokens=256,
    dyncp=True,
    # With a listener each, whom the kernel deals connections to; else an idle server gives them to one worker alone.
    flags=("--tokenizer-worker-num", str(WORKERS), "--enable-http-worker-reuseport"),
    # uvicorn ends a worker that does not answer within 10 s, and on a busy machine it imports for longer.
    environment=(("SGLANG_DYNCP_CHECK_EVERY_STEP", "1"), ("SGLANG_UVICORN_WORKER_HEALTHCHECK_TIMEOUT", "300")),
)
START_LIMIT_S = 300.0
"""SGLang's server is healthy as soon as one worker is up; on a busy machine the next comes a minute later."""


class Worker:
    """One worker, by a connection that it has accepted and that stays open."""

    def __init__(self, connection: http.client.HTTPConnection) -> None:
        self._connection = connection

    def ask(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """Status and parsed body."""
        self._connection.request(method, path, None if body is None else json.dumps(body), {"Content-Type": "application/json"})
        response = self._connection.getresponse()
        return response.status, json.loads(response.read())

    def generate(self, ids: list[int], **sampling: Any) -> dict[str, Any]:
        body = {"input_ids": ids, "sampling_params": {"temperature": 0, "max_new_tokens": 12} | sampling}
        status, answer = self.ask("POST", "/generate", body)
        assert status == 200, answer
        return dict(answer)


def owner_of(connection: http.client.HTTPConnection, server: Server) -> int:
    """The process at the server's end: a connection has one owner, the listening sockets several."""
    port = connection.sock.getsockname()[1]
    for process in psutil.Process(server.process.pid).children(recursive=True):
        for end in process.net_connections(kind="tcp"):
            if end.laddr.port == server.port and end.raddr and end.raddr.port == port:
                return process.pid
    raise AssertionError(f"no process of the server has the connection from port {port}")


@pytest.fixture(scope="module")
def workers(serve: Callable[[ServerConfig], Server]) -> Iterator[list[Worker]]:
    server = serve(CONFIG)
    found: dict[int, Worker] = {}
    opened: list[http.client.HTTPConnection] = []
    deadline = time.monotonic() + START_LIMIT_S
    while len(found) < WORKERS and time.monotonic() < deadline:
        time.sleep(0.1)
        opened.append(connection := http.client.HTTPConnection("127.0.0.1", server.port, timeout=180))
        connection.request("GET", "/model_info")
        connection.getresponse().read()
        found.setdefault(owner_of(connection, server), Worker(connection))
    assert len(found) == WORKERS, f"{len(opened)} connections went to {len(found)} of {WORKERS} workers"
    yield list(found.values())
    for connection in opened:
        connection.close()


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("/generate", {"input_ids": [5, VOCABULARY_SIZE]}, "input_ids[1] must be an integer"),
    ("/generate", {"input_ids": [5, VOCABULARY_SIZE], "stream": True}, "input_ids[1] must be an integer"),
    ("/generate", {"input_ids": [5], "sampling_params": {"custom_params": {"dyncp": {"degree": 3}}}}, "custom_params.dyncp.degree"),
    ("/generate", {"input_ids": random_ids(2040, seed=1)}, "exceed 2031 tokens"),
    ("/generate", {"input_ids": [5], "return_hidden_states": True}, "return_hidden_states does not work with --enable-dyncp"),
    ("/v1/completions", {"model": "default", "prompt": "hello", "n": 5000}, "n must be an integer in 1..4096"),
    ("/v1/embeddings", {"model": "default", "input": "hello"}, "such models do not decode"),
    ("/pause_generation", {"mode": "retract"}, 'pause_generation with mode "retract" does not work'),
    ("/release_memory_occupation", {}, "release_memory_occupation does not work with --enable-dyncp"),
]


@pytest.mark.parametrize(("path", "body", "message"), REFUSED, ids=[message for _, _, message in REFUSED])
def test_each_worker_refuses(workers: list[Worker], path: str, body: dict[str, Any], message: str) -> None:
    for worker in workers:
        status, answer = worker.ask("POST", path, body)
        assert (status, message in json.dumps(answer, ensure_ascii=False).replace('\\"', '"')) == (400, True), answer


def test_each_worker_answers_a_prompt_beyond_one_pool(workers: list[Worker]) -> None:
    prompt = recall_prompt(1500, depth=0.3, seed=1)
    for worker in workers:
        answer = worker.generate(prompt.ids)
        assert answer["text"] == prompt.answer
        assert answer["meta_info"]["dyncp"]["degree_end"] == 2


def test_each_worker_reports_the_requests_of_all(workers: list[Worker]) -> None:
    sent = [worker.generate([5], max_new_tokens=1)["meta_info"]["id"] for worker in workers]
    for worker in workers:
        status, report = worker.ask("GET", "/dyncp/requests")
        assert (status, [instance["rank"] for instance in report["instances"]]) == (200, [0, 1])
        assert set(sent) <= {entry["rid"] for entry in report["requests"]}


@pytest.mark.parametrize("mode", ["in_place", "abort"])
def test_a_pause_by_one_worker_is_ended_by_another(workers: list[Worker], mode: str) -> None:
    first, second = workers
    expected = second.generate(random_ids(300, seed=2))["output_ids"]
    assert first.ask("POST", "/pause_generation", {"mode": mode})[0] == 200
    assert second.ask("POST", "/continue_generation", {})[0] == 200
    assert [worker.generate(random_ids(300, seed=2))["output_ids"] for worker in workers] == [expected] * WORKERS
