"""Ends a server with everything it started, also when the run that started it was killed."""

from __future__ import annotations

import os
import signal
import time

import psutil


def end_process_tree(pid: int, *, grace_s: float = 15.0) -> None:
    """SIGTERM to the leader of process group `pid`, then SIGKILL to whatever of its tree or group is left after `grace_s`.

    The tree is recorded first: a child whose parent has gone could not be found afterwards.
    """
    family = _family(pid)
    _signal(pid, signal.SIGTERM)
    _, alive = psutil.wait_procs(family, timeout=grace_s)
    for process in {*alive, *_group_members(pid)}:
        _signal(process.pid, signal.SIGKILL)
    deadline = time.monotonic() + 10.0
    while any(_is_running(process) for process in family) or _group_members(pid):
        if time.monotonic() > deadline:
            raise RuntimeError(f"processes of group {pid} survived SIGKILL: {[p.pid for p in family if _is_running(p)]}")
        time.sleep(0.05)


def kill_process_tree(pid: int) -> None:
    """SIGKILL to the tree of process group `pid` at once, for a server that nobody uses any more: SGLang takes 5 to 15 s to end by SIGTERM.

    Python's resource trackers are spared: they end when their processes have gone, and remove the named semaphores that those left.
    """
    family = _family(pid)
    for process in family:
        if not _is_resource_tracker(process):
            _signal(process.pid, signal.SIGKILL)
    psutil.wait_procs(family, timeout=5.0)
    end_process_tree(pid, grace_s=0.0)


def creation_time(pid: int) -> float | None:
    """When process `pid` was made; None if there is none. Together with the pid it names one process for good."""
    try:
        return psutil.Process(pid).create_time()
    except psutil.NoSuchProcess:
        return None


def _family(pid: int) -> list[psutil.Process]:
    try:
        leader = psutil.Process(pid)
        return [leader, *leader.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _group_members(group: int) -> list[psutil.Process]:
    members = []
    for process in psutil.process_iter(["pid"]):
        try:
            if os.getpgid(process.pid) == group and _is_running(process):
                members.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return members


def _is_resource_tracker(process: psutil.Process) -> bool:
    try:
        return any("multiprocessing.resource_tracker" in word for word in process.cmdline())
    except psutil.NoSuchProcess:
        return False


def _is_running(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _signal(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return
