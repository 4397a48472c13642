"""`sglang-dcp serve --restart N`: stays the server's parent and starts it again when it has been lost. Standard library only.

What it starts again: exit code 75 (an instance died or hung; clients have their answers), and death by a signal that nobody sent through
it (out of memory). What it does not: exit code 0 and every other one, because settings that are refused once are refused again.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Protocol

TRY_AGAIN = 75
WINDOW_SECONDS = 600.0
FIRST_PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 60.0
LOOK_SECONDS = 1.0
PASSED_ON = (signal.SIGTERM, signal.SIGINT)


class Process(Protocol):
    """What is used of subprocess.Popen."""

    def wait(self, timeout: float) -> int: ...

    def send_signal(self, sig: int) -> None: ...


@dataclass
class RestartBudget:
    """At most `limit` restarts within WINDOW_SECONDS; the pause before each doubles, and falls back when the window is empty."""

    limit: int
    _times: deque[float] = field(default_factory=deque)

    def take(self, now: float) -> float | None:
        """Seconds to wait before a restart at time `now`, or None when the budget is spent."""
        while self._times and now - self._times[0] >= WINDOW_SECONDS:
            self._times.popleft()
        if len(self._times) >= self.limit:
            return None
        self._times.append(now)
        return float(min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2 ** (len(self._times) - 1)))


class Supervisor:
    """Runs one server after the other. start: launches it. clock, pause: seconds now, and a wait for some; for tests."""

    def __init__(
        self,
        start: Callable[[], Process],
        limit: int,
        *,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], object] | None = None,
    ) -> None:
        self._start = start
        self._budget = RestartBudget(limit)
        self._clock = clock
        self._told = threading.Event()  # time.sleep would go on after a signal
        self._pause = pause or self._told.wait
        self._process: Process | None = None
        self._told_to_end: int | None = None

    def pass_on(self, number: int, frame: FrameType | None = None) -> None:
        """Signal handler: the server drains, and is not started again."""
        self._told_to_end = number
        self._told.set()
        if self._process is not None:
            self._process.send_signal(number)

    def run(self) -> int:
        """Exit code of the last server, as a shell gives it: 128 + n for death by signal n."""
        while True:
            if self._told_to_end is not None:
                return 128 + self._told_to_end
            self._process = self._start()
            if self._told_to_end is not None:  # it came before there was anybody to pass it on to
                self._process.send_signal(self._told_to_end)
            code = _wait(self._process)
            self._process = None
            exit_code = code if code >= 0 else 128 - code
            if self._told_to_end is not None or not (code == TRY_AGAIN or code < 0):
                return exit_code
            pause_s = self._budget.take(self._clock())
            if pause_s is None:
                _say(f"the server ended with {_describe(code)}; {self._budget.limit} restarts in {WINDOW_SECONDS:.0f} s were not enough")
                return exit_code
            _say(f"the server ended with {_describe(code)}; starting it again in {pause_s:.0f} s")
            self._pause(pause_s)


def _wait(process: Process) -> int:
    """A signal that comes just before waitpid blocks is handled when that returns: a wait without a limit could hold it back for ever."""
    while True:
        try:
            return process.wait(timeout=LOOK_SECONDS)
        except subprocess.TimeoutExpired:
            continue


def supervise(command: Sequence[str], environment: Mapping[str, str], limit: int) -> int:
    """Runs `command` and starts it again as described above. Returns its last exit code.

    The server is in a process group of its own: a terminal's Ctrl-C reaches it once, through us, and not twice.
    """
    supervisor = Supervisor(lambda: subprocess.Popen(command, env=dict(environment), process_group=0), limit)
    for number in PASSED_ON:
        signal.signal(number, supervisor.pass_on)
    return supervisor.run()


def _describe(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


def _say(text: str) -> None:
    print(f"sglang-dcp serve: {text}", file=sys.stderr, flush=True)
