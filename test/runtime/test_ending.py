"""An instance of two is killed, stopped, or raises, under eight open requests: all get HTTP 503 or an error event, code 75, nothing stays.

No time decides but generous bounds; the measured ones are printed, and `python -m benchmark.serving.kill` publishes them.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from benchmark.serving.kill import EXIT_SECONDS, kill_instance, lose, wait_until_gone
from benchmark.serving.leftovers import Possessions
from benchmark.serving.mixed import Outcome, mixed_server
from testing.hook_report import raising_by, tell
from testing.recall import recall_prompt
from testing.server import Server, ServerConfig, ServerPool

pytestmark = [pytest.mark.server, pytest.mark.timeout(900)]

HANG_SECONDS = 10
BOUND_S = 10.0


def assert_clear(outcomes: list[Outcome], seconds: float, bound_s: float, *words: str) -> None:
    """Every client was told, in time, and why."""
    print(f"last answer after {seconds:.2f} s")
    assert len(outcomes) == 8
    assert {outcome.status for outcome in outcomes} == {503}, outcomes
    for outcome in outcomes:
        assert all(word in outcome.message for word in ("the server is ending", *words)), outcome
    assert seconds < bound_s


def assert_ended(server: Server, possessions: Possessions) -> None:
    assert server.process.wait(EXIT_SECONDS) == 75, server.last_words()
    assert wait_until_gone(possessions) == []


def test_killed_and_started_again(pool: ServerPool) -> None:
    server = pool.get(mixed_server("--restart", "1"))
    seconds, outcomes, first = lose(server, kill_instance)
    assert_clear(outcomes, seconds, BOUND_S, "instance 1", "SIGKILL")
    deadline = time.monotonic() + 480
    while not server.client.is_healthy():
        assert server.is_alive and time.monotonic() < deadline, server.last_words()
        time.sleep(0.5)
    assert "exit code 75; starting it again in 1 s" in server.log()
    prompt = recall_prompt(300, 0.5, 3)
    assert server.client.generate(prompt.text).text == prompt.answer
    supervisor = psutil.Process(server.process.pid)
    of_the_first = [line for line in first.left() if f"process {supervisor.pid} " not in line and "port" not in line]
    assert of_the_first == []
    second = Possessions.of(server.process.pid, server.port)
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(EXIT_SECONDS) == 0
    assert wait_until_gone(second) == []


def test_stopped(pool: ServerPool) -> None:
    server = pool.get(mixed_server("--dyncp-hang-seconds", str(HANG_SECONDS)))
    seconds, outcomes, possessions = lose(server, lambda had: had.instance(1).send_signal(signal.SIGSTOP))
    words = ("no step for 10 s", "instance 1", "is stopped by a signal", "instance 0 at step")
    assert_clear(outcomes, seconds, HANG_SECONDS + BOUND_S, *words)
    assert_ended(server, possessions)


def test_raised(serve: Callable[[ServerConfig], Server], tmp_path: Path) -> None:
    told = tmp_path / "raise"
    server = serve(raising_by(mixed_server(), told))
    seconds, outcomes, possessions = lose(server, lambda had: tell(told, "1"))
    assert_clear(outcomes, seconds, BOUND_S, "instance 1 raised in step", "RuntimeError: told to raise by a test")
    assert_ended(server, possessions)
