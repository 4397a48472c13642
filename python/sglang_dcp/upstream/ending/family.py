"""The processes of this server: which of them is which instance, what has become of them, and their end."""

from __future__ import annotations

import logging
import re
import signal
from collections.abc import Iterable
from dataclasses import dataclass, field

import psutil

logger = logging.getLogger(__name__)

REAP_SECONDS = 20.0
"""Longest wait for killed processes: the driver takes seconds to give back a GPU's memory."""

_INSTANCE = re.compile(r"sglang::scheduler_DP(\d+)(?:.*?_TP(\d+))?")
_ROLE = re.compile(r"sglang::(\w+)")


@dataclass(frozen=True)
class Member:
    """A process of ours. role: "instance 2" ("instance 2, slice 1" where it has several), "detokenizer"... A process that has died has no
    title, so it is read while it lives."""

    process: psutil.Process
    role: str


@dataclass
class Family:
    """Everything that the main process has started. `refresh` adds what came since; a member stays when it has died. num_slices: of an
    instance."""

    members: dict[int, Member] = field(default_factory=dict)
    num_slices: int = 1

    def refresh(self) -> None:
        for process in psutil.Process().children(recursive=True):
            if process.pid not in self.members and (role := _role_of(process, self.num_slices)) is not None:
                self.members[process.pid] = Member(process, role)

    def describe_dead(self, exit_codes: dict[int, int | None]) -> list[str]:
        """One clause per member that has not ended by itself, worst news first. exit_codes: by pid, of multiprocessing's own children."""
        lines = []
        for pid, member in sorted(self.members.items(), key=lambda item: item[1].role):
            code = exit_codes.get(pid)
            if code is not None and code < 0:
                lines.append(f"{member.role} (pid {pid}) was killed by {_signal_name(-code)}")
            elif code:
                lines.append(f"{member.role} (pid {pid}) ended with exit code {code}")
        return lines

    def describe_stopped(self) -> list[str]:
        """One clause per member that a signal or a debugger holds."""
        return [f"{m.role} (pid {pid}) is stopped by a signal" for pid, m in sorted(self.members.items()) if _is_stopped(m.process)]

    def kill(self) -> None:
        """Ends every process below this one. Python's own resource tracker is spared: it removes semaphores when all others have gone."""
        self.refresh()
        children = [p for p in psutil.Process().children(recursive=True) if not _is_resource_tracker(p)]
        for process in children:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        _, alive = psutil.wait_procs(children, timeout=REAP_SECONDS)
        if alive:
            logger.error("dyncp: processes %s are not gone %.0f s after SIGKILL", [p.pid for p in alive], REAP_SECONDS)


def read_exit_codes(processes: Iterable[object]) -> dict[int, int | None]:
    """Exit codes by pid of multiprocessing.Process objects; None for one that runs."""
    return {process.pid: process.exitcode for process in processes}  # type: ignore[attr-defined]


def _role_of(process: psutil.Process, num_slices: int) -> str | None:
    try:
        return role_of_title(" ".join(process.cmdline()), num_slices)
    except psutil.Error:
        return None


def role_of_title(title: str, num_slices: int = 1) -> str | None:
    """None for processes that SGLang does not name: a fork that is about to become something, a helper of Python."""
    if found := _INSTANCE.match(title):
        instance, rank = found.groups()
        return f"instance {instance}" if num_slices == 1 or rank is None else f"instance {instance}, slice {int(rank) % num_slices}"
    if role := _ROLE.match(title):
        return role.group(1).replace("_", " ")
    return None


def _is_stopped(process: psutil.Process) -> bool:
    try:
        return bool(process.status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP))
    except psutil.NoSuchProcess:
        return False


def _is_resource_tracker(process: psutil.Process) -> bool:
    try:
        return "multiprocessing.resource_tracker" in " ".join(process.cmdline())
    except psutil.Error:
        return False


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
