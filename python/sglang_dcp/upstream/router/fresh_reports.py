"""Load snapshots of several hosts come to the router over ZeroMQ, and SGLang takes them in when a request does. All others of this host
read what the router has taken in: whether instances get on, and what ended one. So it looks by itself too.

On one host schedulers write where everybody reads, and nothing has to be taken in.
"""

from __future__ import annotations

import logging
import threading
from typing import Any

logger = logging.getLogger(__name__)

LOOK_SECONDS = 0.25


class FreshReports:
    """In place of the router's reader: the same, taken in by a thread as well. A ZeroMQ socket has one user at a time, hence the lock."""

    def __init__(self, reader: Any) -> None:
        self._reader = reader
        self._lock = threading.Lock()

    def read_all(self) -> Any:
        with self._lock:
            return self._reader.read_all()

    def read(self, dp_rank: int) -> Any:
        with self._lock:
            return self._reader.read(dp_rank)

    def poll(self) -> None:
        with self._lock:
            self._reader.poll()

    def keep_polling(self, ended: threading.Event) -> None:
        """Until `ended` is set."""
        while not ended.wait(LOOK_SECONDS):
            self.poll()


def keep_reports_fresh(controller: Any) -> None:
    """Wraps the reader of a router that owns the socket of several hosts' snapshots; on one host nothing changes."""
    reader = controller.load_snapshot_reader
    if not hasattr(reader, "poll"):
        return
    controller.load_snapshot_reader = fresh = FreshReports(reader)
    threading.Thread(target=fresh.keep_polling, args=(threading.Event(),), name="dyncp-reports", daemon=True).start()
    logger.info("dyncp: load snapshots of several hosts are taken in every %g s", LOOK_SECONDS)
