"""One server of ours at a time on this machine."""

from __future__ import annotations

import fcntl
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from testing.processes import creation_time, end_process_tree

LOCK_FILE = Path(tempfile.gettempdir()) / "sglang_dcp_server.lock"


@contextmanager
def machine_lock(*, wait_s: float = 3600.0) -> Iterator[IO[str]]:
    """Held while a server of ours lives; a second test run on this machine waits here instead of sharing the cores."""
    with LOCK_FILE.open("a+") as lock:
        _wait_for_lock(lock, wait_s)
        _end_recorded_leftover(lock)
        yield lock


def _wait_for_lock(lock: IO[str], wait_s: float) -> None:
    """Asleep in the kernel, which wakes those who wait in the order in which they came: who looks now and then may wait for ever."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return
    except BlockingIOError:
        print(f"waiting: another test run or demo on this machine has a server ({LOCK_FILE})", file=sys.stderr, flush=True)
    waiter = threading.Thread(target=fcntl.flock, args=(lock.fileno(), fcntl.LOCK_EX), daemon=True)
    waiter.start()
    waiter.join(wait_s)
    if waiter.is_alive():  # once the file is closed, what the thread may still get is let go at once
        raise TimeoutError(f"{LOCK_FILE} is held by another run for more than {wait_s:.0f} s")


def _end_recorded_leftover(lock: IO[str]) -> None:
    """Ends the server that a killed run left behind: who holds the lock knows that nobody uses it."""
    lock.seek(0)
    noted = lock.read().split()
    if len(noted) == 2 and creation_time(int(noted[0])) == float(noted[1]):
        end_process_tree(int(noted[0]))
    record(lock, None)


def record(lock: IO[str], pid: int | None) -> None:
    """The server that runs under the lock, for whoever gets it after a run that was killed."""
    lock.seek(0)
    lock.truncate()
    if pid is not None and (made := creation_time(pid)) is not None:
        lock.write(f"{pid} {made!r}")
    lock.flush()
