"""When SGLang is to look at its waiting queue again.

It does so once a running request has left (`batch_is_full`). Here pages come free otherwise too: with a guest, with a promise, with what is
retained, or by a grant.
"""

from __future__ import annotations

from typing import Any

from sglang_dcp.ledger.promise_turns import LONG_WAIT_STEPS
from sglang_dcp.upstream.step.queued import is_without_pages, without_pages
from sglang_dcp.upstream.step.runtime import Runtime


def note_blocked(runtime: Runtime, req: Any) -> None:
    """The local request that found no room now, and the step in which it found none for the first time (elsewhere.py)."""
    if runtime.queues.blocked is not req:
        runtime.queues.blocked, runtime.queues.room = req, None
    if getattr(req, "dyncp_blocked_since", None) is None:
        req.dyncp_blocked_since = runtime.participant.step


def holds_up_others(runtime: Runtime) -> bool:
    """Whether requests of the ledger wait here, which need nothing of what a local one waits for, or hold it."""
    return bool(runtime.queues.waiting) or any(is_sharded(req) for req in without_pages(runtime.scheduler))


def is_sharded(req: Any) -> bool:
    placement = getattr(req, "dyncp_placement", None)
    return placement is not None and not placement.is_local


def look_again(runtime: Runtime, running_batch: Any) -> None:
    """Ahead of a round: SGLang looks at its queue where there is more room than in the round before, or where pages have come."""
    queues, participant = runtime.queues, runtime.participant
    if queues.blocked is not None and not is_without_pages(runtime.scheduler, queues.blocked):
        queues.blocked = None
    blocked = queues.blocked
    since = None if blocked is None else blocked.dyncp_blocked_since
    participant.local_waits_long = since is not None and participant.step - since > LONG_WAIT_STEPS
    if any(is_ready(req) for req in queues.waiting.values()):
        running_batch.batch_is_full = False
    if blocked is not None:
        room = runtime.pool.num_givable_pages() - participant.withheld_pages
        if queues.room is None or room > queues.room:
            running_batch.batch_is_full = False
        queues.room = room


def is_ready(req: Any) -> bool:
    return req.dyncp is not None and req.dyncp.ready
