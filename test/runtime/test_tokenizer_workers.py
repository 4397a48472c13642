"""Two tokenizer workers (--tokenizer-worker-num 2): each checks its requests, and each knows the whole server."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from upstream.checkpoints import checkpoint_server

from testing.client import RequestFailed
from testing.recall import VOCABULARY_SIZE, random_ids
from testing.server import Server, ServerConfig

WORKERS = 2
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


def title_of(process: psutil.Process) -> str:
    return " ".join(process.cmdline())


@pytest.fixture(scope="module")
def server(serve: Callable[[ServerConfig], Server], checkpoint: Callable[[str], Path]) -> Server:
    """That of test_tiny_checkpoints.py."""
    return serve(checkpoint_server(checkpoint("Glm4MoeLiteForCausalLM"), workers=True))


@pytest.fixture(scope="module")
def workers(server: Server) -> Iterator[list[Worker]]:
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


VICTIM = "sglang::scheduler_DP1"
LONG = random_ids(1500, seed=3)
PINNED: dict[str, Any] = {"ignore_eos": True, "custom_params": {"dyncp": {"degree": 2, "home": 0}}}

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


@pytest.fixture(scope="module")
def beyond_one_pool(workers: list[Worker]) -> list[int]:
    """What the first worker answers to LONG, on both instances."""
    answer = workers[0].generate(LONG, **PINNED)
    assert answer["meta_info"]["dyncp"]["degree_end"] == 2
    return list(answer["output_ids"])


def test_each_worker_answers_a_prompt_beyond_one_pool(workers: list[Worker], beyond_one_pool: list[int]) -> None:
    assert [worker.generate(LONG, **PINNED)["output_ids"] for worker in workers] == [beyond_one_pool] * WORKERS


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
    assert first.ask("GET", "/dyncp/load")[0] == 200  # answered behind the pause: the second's word cannot overtake it
    assert second.ask("POST", "/continue_generation", {})[0] == 200
    assert [worker.generate(random_ids(300, seed=2))["output_ids"] for worker in workers] == [expected] * WORKERS


JOIN = """
import json, sys
from sglang.srt.entrypoints.engine import Engine

parent, prompt, sampling = json.loads(sys.argv[1])
engine = Engine.attach_tokenizer_worker(parent)
answer = engine.generate(input_ids=prompt, sampling_params=sampling)
told = {"ids": answer["output_ids"], "degree": answer["meta_info"]["dyncp"]["degree_end"]}
try:
    engine.generate(input_ids=[5, 99999], sampling_params=sampling)
except ValueError as refusal:
    told["refusal"] = str(refusal)
print("TOLD " + json.dumps(told))
"""


def test_a_process_that_joins_checks_its_requests(server: Server, workers: list[Worker], beyond_one_pool: list[int]) -> None:
    """By Engine.attach_tokenizer_worker(), from a process that is no child of the server. The server goes on without it."""
    asked = json.dumps([server.process.pid, LONG, {"temperature": 0, "max_new_tokens": 12} | PINNED])
    result = subprocess.run([sys.executable, "-c", JOIN, asked], capture_output=True, text=True, check=False, timeout=280)
    lines = [line for line in result.stdout.splitlines() if line.startswith("TOLD ")]
    assert lines, result.stderr[-2000:]
    told = json.loads(lines[0].removeprefix("TOLD "))
    assert (told["ids"], told["degree"]) == (beyond_one_pool, 2)
    assert told["refusal"].startswith("input_ids[1] must be an integer")
    assert len(workers[0].generate([5], max_new_tokens=1, ignore_eos=True)["output_ids"]) == 1


def test_the_loss_of_an_instance_answers_everybody_and_ends_the_server(server: Server, workers: list[Worker]) -> None:
    """The last test of this server. uvicorn's supervisor drops the signal that would end it, and clients would wait for ever."""
    (instance,) = (
        process for process in psutil.Process(server.process.pid).children(recursive=True) if title_of(process).startswith(VICTIM)
    )

    def ask(number: int) -> int:
        """The status that a client sees."""
        try:
            answer = server.client.generate(random_ids(600, seed=number), max_new_tokens=1000, sampling={"ignore_eos": True})
        except RequestFailed as failure:
            return failure.status
        return int(answer.meta["finish_reason"].get("status_code", 200))

    with ThreadPoolExecutor(4) as executor:
        asked = [executor.submit(ask, number) for number in range(4)]
        with server.client.stream(random_ids(600, seed=9), max_new_tokens=1000, sampling={"ignore_eos": True}) as stream:
            events = stream.events()
            next(events)
            instance.kill()
            assert list(events)[-1]["meta_info"]["finish_reason"]["status_code"] == 503
        assert [task.result() for task in asked] == [503] * 4
    assert server.process.wait(timeout=120) == 75
