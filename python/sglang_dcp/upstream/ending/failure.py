"""A scheduler that raises leaves its last words where the main process finds them: in its load snapshot."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from typing import Any

from sglang_dcp.upstream.router.load_report import ReportedLoad
from sglang_dcp.upstream.step.attached import current

logger = logging.getLogger(__name__)

MOST_CHARACTERS = 500
"""Of an error's text: a snapshot has a bounded slot, and the log has the rest."""


def run_event_loop(original: Callable[..., None], scheduler: Any) -> None:
    """AROUND Scheduler.run_event_loop. SGLang logs the exception and signals the main process, without a word of who and why."""
    try:
        original(scheduler)
    except Exception as error:
        leave_last_words(scheduler, error)
        raise


def leave_last_words(scheduler: Any, error: Exception) -> None:
    """Overwrites this instance's snapshot. The stamp tells which of several instances failed first: the others only lose their peer."""
    writer, runtime = scheduler.load_snapshot_writer, current()
    if writer is None:
        return
    step = 0 if runtime is None else runtime.participant.step
    text = f"{type(error).__name__}: {error}"[:MOST_CHARACTERS]
    try:
        writer.write(ReportedLoad(timestamp=time.time(), dp_rank=writer.dp_rank, dyncp_step=step, dyncp_failure=text))
    except OSError as problem:
        logger.error("dyncp: the main process cannot be told of the failure: %s", problem)


def describe_failures(snapshots: Iterable[Any]) -> list[str]:
    """The first failure among the snapshots of all instances: ["instance 1, step 12: ValueError: ..."], or nothing."""
    failed = sorted((s.timestamp, s.dp_rank, s.dyncp_step, s.dyncp_failure) for s in snapshots if getattr(s, "dyncp_failure", ""))
    return [f"instance {rank} raised in step {step}: {text}" for _, rank, step, text in failed[:1]]
