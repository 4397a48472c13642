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
from sglang.srt.managers.load_snapshot import ZmqLoadSnapshotWriter, create_load_snapshot_writer
from sglang.srt.runtime_context import get_parallel

from sglang_dcp.dataflow.transport.base import TransportError
from sglang_dcp.upstream.router.load_report import ReportedLoad
from sglang_dcp.upstream.step.attached import current

logger = logging.getLogger(__name__)

MOST_CHARACTERS = 500
"""Of an error's text: a snapshot has a bounded slot, and the log has the rest."""
SENT_SECONDS = 0.3
"""For a snapshot that goes to another host: SGLang drops what is not sent when the process ends."""
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
    """Overwrites this instance's snapshot. Slices of an instance share it: one that lost a peer leaves what that peer may have said."""
    runtime, lost = current(), lost_a_peer(error)
    writer = scheduler.load_snapshot_writer or make_slice_writer(scheduler)
    if writer is None or (lost and get_parallel().attn_tp_size > 1):
        return
    step = 0 if runtime is None else runtime.participant.step
    text = f"{type(error).__name__}: {error}"[:MOST_CHARACTERS]
    try:
        writer.write(ReportedLoad(timestamp=time.time(), dp_rank=writer.dp_rank, dyncp_step=step, dyncp_failure=text, dyncp_lost_peer=lost))
    except OSError as problem:
        logger.error("dyncp: the main process cannot be told of the failure: %s", problem)
    if isinstance(writer, ZmqLoadSnapshotWriter):
        time.sleep(SENT_SECONDS)


def make_slice_writer(scheduler: Any) -> Any:
    """For a slice other than the first: SGLang gives it none. None before the instance is attached."""
    ports, parallel = getattr(scheduler, "dyncp_ports", None), get_parallel()
    return None if ports is None else create_load_snapshot_writer(ports, parallel.num_dp_ranks, parallel.attn_dp_rank)


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
    return [f"instance {first.dp_rank} raised in step {first.dyncp_step}: {first.dyncp_failure}" for first in failed[:1]]
