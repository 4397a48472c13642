"""`serve --restart`: what is started again, how often, and what becomes of signals. No process is started but in the last tests."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from sglang_dcp.cli import serve as cli_serve
from sglang_dcp.cli.supervise import LONGEST_PAUSE_SECONDS, TRY_AGAIN, WINDOW_SECONDS, RestartBudget, Supervisor


class FakeProcess:
    """Ends with `code`; `meanwhile` happens while it runs."""

    def __init__(self, code: int, meanwhile=lambda: None) -> None:
        self.code = code
        self.meanwhile = meanwhile
        self.signals: list[int] = []
        self.looks = 0

    def wait(self, timeout: float) -> int:
        self.looks += 1
        if self.looks < 3:
            raise subprocess.TimeoutExpired("server", timeout)
        self.meanwhile()
        return self.code

    def send_signal(self, sig: int) -> None:
        self.signals.append(sig)


def supervised(processes: list[FakeProcess], limit: int) -> tuple[Supervisor, list[float], list[FakeProcess]]:
    left, pauses = list(processes), []
    return Supervisor(lambda: left.pop(0), limit, clock=lambda: 0.0, pause=pauses.append), pauses, left


@pytest.mark.parametrize("lost", [TRY_AGAIN, -signal.SIGKILL, -signal.SIGSEGV])
def test_a_lost_server_is_started_again(lost: int) -> None:
    supervisor, pauses, left = supervised([FakeProcess(lost), FakeProcess(0)], 3)
    assert supervisor.run() == 0
    assert (len(pauses), left) == (1, [])


@pytest.mark.parametrize("code", [0, 1, 2, 137])
def test_every_other_end_is_the_end(code: int) -> None:
    supervisor, pauses, left = supervised([FakeProcess(code), FakeProcess(0)], 3)
    assert supervisor.run() == code
    assert (pauses, len(left)) == ([], 1)


def test_the_budget_bounds_restarts_and_the_last_code_is_passed_on() -> None:
    supervisor, pauses, left = supervised([FakeProcess(TRY_AGAIN), FakeProcess(TRY_AGAIN), FakeProcess(-9), FakeProcess(0)], 2)
    assert supervisor.run() == 128 + 9
    assert (pauses, len(left)) == ([1.0, 2.0], 1)


def test_pauses_double_up_to_a_limit_and_old_restarts_are_forgotten() -> None:
    budget = RestartBudget(8)
    pauses = [budget.take(float(i)) for i in range(9)]
    assert pauses == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, LONGEST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS, None]
    assert budget.take(WINDOW_SECONDS - 0.5) is None
    assert budget.take(WINDOW_SECONDS) is not None  # the first one is ten minutes old
    assert budget.take(WINDOW_SECONDS) is None
    assert budget.take(3 * WINDOW_SECONDS) == 1.0


@pytest.mark.parametrize("code", [0, TRY_AGAIN, -signal.SIGTERM])
def test_a_signal_is_passed_on_and_ends_the_restarts(code: int) -> None:
    process = FakeProcess(code, meanwhile=lambda: supervisor.pass_on(signal.SIGTERM))
    supervisor, pauses, left = supervised([process, FakeProcess(0)], 3)
    assert supervisor.run() == (code if code >= 0 else 128 - code)
    assert (process.signals, pauses, len(left)) == ([signal.SIGTERM], [], 1)


def test_a_signal_between_two_servers_starts_no_other() -> None:
    left = [FakeProcess(TRY_AGAIN), FakeProcess(0)]
    supervisor = Supervisor(lambda: left.pop(0), 3, pause=lambda seconds: supervisor.pass_on(signal.SIGINT))
    assert supervisor.run() == 128 + signal.SIGINT
    assert len(left) == 1


def test_a_signal_while_a_server_is_being_started_reaches_it() -> None:
    process = FakeProcess(0)

    def start() -> FakeProcess:
        supervisor.pass_on(signal.SIGTERM)
        return process

    supervisor = Supervisor(start, 3)
    assert supervisor.run() == 0
    assert process.signals == [signal.SIGTERM]


def test_the_flag_is_ours_and_leaves_the_others_as_they_are() -> None:
    assert cli_serve.split_restart(["--model-path", "m", "--restart", "3", "--tp", "2"]) == (3, ["--model-path", "m", "--tp", "2"])
    assert cli_serve.split_restart(["--restart=1", "-x", "--unknown=2"]) == (1, ["-x", "--unknown=2"])
    assert cli_serve.split_restart(["--restarts", "2"]) == (None, ["--restarts", "2"])
    for wrong in (["--restart", "0"], ["--restart", "-1"], ["--restart", "x"], ["--restart"]):
        with pytest.raises(SystemExit, match="--restart"):
            cli_serve.split_restart(wrong)


SUPERVISE = "import sys; from sglang_dcp.cli.supervise import supervise; sys.exit(supervise(sys.argv[2:], {}, int(sys.argv[1])))"


def test_real_processes_are_started_again_and_the_limit_is_said() -> None:
    command = [sys.executable, "-c", SUPERVISE, "1", "/bin/sh", "-c", "echo up; kill -9 $$"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.split()) == (137, ["up", "up"])
    assert "SIGKILL; starting it again in 1 s" in done.stderr
    assert "1 restarts in 600 s were not enough" in done.stderr


def test_a_signal_to_the_parent_ends_the_server_in_its_own_way() -> None:
    inner = "import signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\nprint('up', flush=True)\ntime.sleep(60)"
    command = [sys.executable, "-c", SUPERVISE, "5", sys.executable, "-c", inner]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        began = time.monotonic()
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(timeout=30) == 0
        assert time.monotonic() - began < 30
