"""The end of a server with several tokenizer workers.

uvicorn's supervisor runs in the main process and takes every signal. It calls its method handle_NAME for each and has none for SIGQUIT, so
SGLang's own handler never runs when an instance is lost: requests would stay open for ever.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections.abc import Iterable
from typing import Any

from uvicorn.supervisors import Multiprocess

from sglang_dcp.upstream.ending.family import Family, read_exit_codes
from sglang_dcp.upstream.ending.handler import ANSWER_SECONDS, EXIT_CODE
from sglang_dcp.upstream.ending.shared_files import SharedFiles

logger = logging.getLogger(__name__)

WORKER_SECONDS = ANSWER_SECONDS + 0.5
"""Time for workers to answer what is open, from the signal on."""


def end_on_sigquit(watchdog: Any) -> None:
    """Gives the supervisor its handle_quit. Called in the main process when the instances are up. watchdog: SGLang's."""
    family = Family()
    family.refresh()

    def handle_quit(supervisor: Multiprocess) -> None:
        _end(family, watchdog, [process.pid for process in supervisor.processes if process.pid is not None])

    Multiprocess.handle_quit = handle_quit  # type: ignore[attr-defined]


def _end(family: Family, watchdog: Any, workers: Iterable[int]) -> None:
    """Whatever goes wrong on the way, processes and files go and the code is 75."""
    try:
        family.refresh()
        dead = family.describe_dead(read_exit_codes(watchdog._processes))
        logger.error("dyncp: the server is ending: %s", "; ".join(dead) or "a process of it failed")
        watchdog.stop()
        files = SharedFiles()
        files.note([os.getpid(), *family.members])
        for pid in workers:
            try:
                os.kill(pid, signal.SIGQUIT)
            except ProcessLookupError:
                continue
        time.sleep(WORKER_SECONDS)
        family.kill()
        files.unlink()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(EXIT_CODE)
