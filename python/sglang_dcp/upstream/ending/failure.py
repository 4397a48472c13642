"""A scheduler that raises leaves its last words where the main process finds them: in its load snapshot.

Instances make their steps together, so the step tells which of several failed first; the others lose a peer in that step or the next.
Clocks of different hosts are not compared.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch.distributed as dist
from sglang.srt.managers.load_snapshot import ZmqLoadSnapshotWriter, create_load_snapshot_reader, create_load_snapshot_writer
from sglang.srt.runtime_context import get_parallel

from sglang_dcp.dataflow.transport.base import TransportError
from sglang_dcp.upstream.router.load_report import ReportedLoad, read_reports
from sglang_dcp.upstream.step.attached import current

logger = logging.getLogger(__name__)

MOST_CHARACTERS = 500
"""Of an error's text: a snapshot has a bounded slot, and the log has the rest."""
SENT_SECONDS = 0.3
"""For a snapshot that goes to another host: SGLang drops what is not sent when the process ends. Slices of an instance wait as long."""
PEER_ENDED = ("connection closed by peer", "connection reset by peer", "broken pipe", "connection refused", "timed out waiting")
"""What gloo says, in a collective of SGLang's or ours, when another instance has gone."""


def run_event_loop(original: Callable[..., None], scheduler: Any) -> None:
    """AROUND Scheduler.run_event_loop. SGLang logs the exception and signals the main process, without a word of who and why."""
    try:
        original(scheduler)
    except Exception as error:
        leave_last_words(scheduler, error)
        raise


def leave_last_words(scheduler: Any, error: Exception) -> None:
    """Overwrites this instance's snapshot, which its slices share. The first writes its loads there too, so another waits until it
    must have lost that one and stands still. One that lost a peer leaves what that peer may have said: a new writer would empty it."""
    runtime, lost, parallel = current(), lost_a_peer(error), get_parallel()
    has_slices = parallel.attn_tp_size > 1
    if has_slices and lost and has_last_words(scheduler):
        return
    if has_slices and scheduler.load_snapshot_writer is None and not lost:
        time.sleep(SENT_SECONDS)
    writer = scheduler.load_snapshot_writer or make_slice_writer(scheduler)
    if writer is None:
        return
    words = ReportedLoad(
        timestamp=time.time(),
        dp_rank=writer.dp_rank,
        dyncp_step=0 if runtime is None else runtime.participant.step,
        dyncp_slice=parallel.attn_tp_rank if has_slices else None,
        dyncp_failure=f"{type(error).__name__}: {error}"[:MOST_CHARACTERS],
        dyncp_lost_peer=lost,
    )
    try:
        writer.write(words)
    except OSError as problem:
        logger.error("dyncp: the main process cannot be told of the failure: %s", problem)
    if isinstance(writer, ZmqLoadSnapshotWriter):
        time.sleep(SENT_SECONDS)


def make_slice_writer(scheduler: Any) -> Any:
    """For a slice other than the first: SGLang gives it none. None before the instance is attached."""
    ports, parallel = getattr(scheduler, "dyncp_ports", None), get_parallel()
    return None if ports is None else create_load_snapshot_writer(ports, parallel.num_dp_ranks, parallel.attn_dp_rank)


def has_last_words(scheduler: Any) -> bool:
    """Whether another slice of this instance has left some."""
    ports = getattr(scheduler, "dyncp_ports", None)
    if ports is None:
        return False
    read_reports()
    reader = create_load_snapshot_reader(ports, "Scheduler")
    try:
        return bool(getattr(reader.read(get_parallel().attn_dp_rank), "dyncp_failure", ""))
    finally:
        reader.close()


def lost_a_peer(error: BaseException | None) -> bool:
    """Whether the error, or what caused it, says that another instance did not answer."""
    while error is not None:
        if isinstance(error, TransportError | dist.DistBackendError) or any(words in str(error).lower() for words in PEER_ENDED):
            return True
        error = error.__cause__ or error.__context__
    return False


def describe_failures(snapshots: Iterable[Any], host_size: int) -> list[str]:
    """The first failure among the snapshots of all instances: ["instance 1, step 12: ValueError: ..."], or nothing. host_size: instances of
    a host, which have a clock in common."""

    def order(snapshot: Any) -> tuple[Any, ...]:
        return snapshot.dyncp_lost_peer, snapshot.dyncp_step, snapshot.dp_rank // host_size, snapshot.timestamp

    failed = sorted((snapshot for snapshot in snapshots if getattr(snapshot, "dyncp_failure", "")), key=order)
    return [f"{_name(first)} raised in step {first.dyncp_step}: {first.dyncp_failure}" for first in failed[:1]]


def _name(snapshot: Any) -> str:
    part = "" if snapshot.dyncp_slice is None else f", slice {snapshot.dyncp_slice}"
    return f"instance {snapshot.dp_rank}{part}"
