"""Servers as forks of a process that has imported SGLang (startup/forking.py), and that process itself: one per environment."""

from __future__ import annotations

import array
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from sglang_dcp.cli.serve import plan_launch
from sglang_dcp.cpu.environment import count_cuda_devices

START_LIMIT_S = 240.0
"""The first fork waits until SGLang is imported."""


READ_LATER = (
    "DYNCP_",
    "MC_",
    "PYTHONPATH",  # of plugins
    "SGLANG_CHECK_KV_PAGE_INVARIANTS",
    "SGLANG_CPU_OMP_THREADS_BIND",
    "SGLANG_DISAGGREGATION_",
    "SGLANG_DYNCP_",
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY",
    "SGLANG_PLUGINS",
    "SGLANG_TIMEOUT_KEEP_ALIVE",
    "SGLANG_UVICORN_WORKER_HEALTHCHECK_TIMEOUT",
)
"""Variables that nothing reads while SGLang is imported: servers that differ in these are forks of one process."""


def python_path(folder: Path, environment: Mapping[str, str]) -> str:
    """The environment's PYTHONPATH with a folder ahead of all others."""
    return os.pathsep.join(filter(None, (str(folder), environment.get("PYTHONPATH"))))


def while_importing(environment: Mapping[str, str], command: Sequence[str], startup: Path) -> dict[str, str]:
    """The part of a server's environment in which its processes import SGLang. command: `sglang-dcp serve ...`."""
    early = {name: value for name, value in environment.items() if not name.startswith(READ_LATER)}
    early["PYTHONPATH"] = python_path(startup, os.environ)
    additions = plan_launch(command[command.index("serve") + 1 :], early, cuda_devices=count_cuda_devices()).additions
    return early | {name: value for name, value in additions.items() if name == "PYTHONPATH" or not name.startswith(READ_LATER)}


class ForkedProcess:
    """What subprocess.Popen offers of a process that another one has forked."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self.returncode: int | None = None
        self.pid = self._read(START_LIMIT_S)

    def poll(self) -> int | None:
        try:
            return self.wait(timeout=0.0)
        except subprocess.TimeoutExpired:
            return None

    def wait(self, timeout: float | None = None) -> int:
        """subprocess.TimeoutExpired if it has not ended within `timeout` seconds."""
        if self.returncode is None:
            self.returncode = self._read(timeout)
            self._channel.close()
        return self.returncode

    def send_signal(self, number: signal.Signals) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def _read(self, timeout: float | None) -> int:
        if not select.select([self._channel], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired("a forked server", timeout or 0.0)
        if not (told := self._channel.recv(32)):
            raise RuntimeError("the process that forks servers has ended: see forking.log beside the servers' logs")
        return int(told)


class ForkHost:
    """The process that forks, of one environment. It ends after `close`, or the end of this process, and that of all that it forked."""

    def __init__(self, environment: Mapping[str, str], log: IO[bytes]) -> None:
        """log: for the output of the process itself."""
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            command = [sys.executable, "-m", "forking", str(theirs.fileno())]
            self._process = subprocess.Popen(
                command, env=dict(environment), pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def fork(self, command: Sequence[str], environment: Mapping[str, str], log: IO[bytes]) -> ForkedProcess:
        """command: `python -m MODULE ...`, run with `environment`, in a session of its own. Output goes to `log`."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            message = json.dumps({"command": list(command), "environment": dict(environment)}).encode()
            files = array.array("i", [log.fileno(), theirs.fileno()])
            self._control.sendmsg([message], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, files)])
        return ForkedProcess(ours)

    def close(self) -> None:
        self._control.close()

    def wait(self, timeout: float) -> None:
        self._process.wait(timeout)


class ForkHosts:
    """A host for each environment that servers were asked in; the one used longest ago closes where more than `most` would be open."""

    def __init__(self, log_folder: Path, most: int = 3) -> None:
        self._log_path, self._most = log_folder / "forking.log", most
        self._open: dict[str, ForkHost] = {}
        self._closed: list[ForkHost] = []
        self._lock = threading.Lock()

    def of(self, environment: Mapping[str, str]) -> ForkHost:
        key = json.dumps(sorted(environment.items()))
        with self._lock:
            self._open[key] = host = self._open.pop(key, None) or self._start(environment)
            if len(self._open) > self._most:
                self._close(next(iter(self._open)))
            return host

    def _start(self, environment: Mapping[str, str]) -> ForkHost:
        with self._log_path.open("ab") as log:
            return ForkHost(environment, log)

    def close(self, wait_s: float = 60.0) -> None:
        """Once all servers have ended."""
        for key in list(self._open):
            self._close(key)
        for host in self._closed:
            host.wait(wait_s)

    def _close(self, key: str) -> None:
        host = self._open.pop(key)
        host.close()
        self._closed.append(host)
