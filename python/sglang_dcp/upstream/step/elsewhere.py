"""A local request that waits while another instance has room: its pages are asked for there. The home stays the same."""

from __future__ import annotations

from typing import Any

from sglang_dcp.policy.split import num_pages
from sglang_dcp.policy.types import Placement
from sglang_dcp.upstream.step.admission import ask_reservation, keep_out_of_prefix_cache
from sglang_dcp.upstream.step.queued import is_without_pages
from sglang_dcp.upstream.step.runtime import Runtime

PATIENCE_STEPS = 8
"""Steps that a request waits for its own pool first: there it may use the prefix cache, and costs no exchange."""


def ask_elsewhere(runtime: Runtime) -> None:
    """The local request that found no room last becomes an ask of the ledger once it has waited long enough and an instance has room
    beyond its promises. One such ask is open at a time: what it is granted changes the room of the next."""
    req, participant = runtime.queues.blocked, runtime.participant
    if runtime.queues.asked_elsewhere in runtime.queues.waiting:
        return
    if req is None or participant.step - req.dyncp_blocked_since < PATIENCE_STEPS:
        return
    if participant.limits.max_degree == 1:
        return
    num_tokens = len(req.origin_input_ids) + len(req.output_ids)
    pages = num_pages(num_tokens, participant.page_size) + 1
    scope = participant.limits.scope(participant.rank, pages)
    others = [rank for rank in scope if rank != participant.rank and participant.room_for_guests(rank) >= pages]
    if not others:
        return
    if not _may_move(req) or not is_without_pages(runtime.scheduler, req):
        return
    runtime.queues.blocked = None
    rank = max(others, key=lambda rank: (participant.room_for_guests(rank), -rank))
    req.dyncp_placement = Placement(participant.rank, (rank,), (num_tokens,))
    keep_out_of_prefix_cache(req)
    ask_reservation(runtime, req)
    runtime.queues.asked_elsewhere = req.dyncp.handle


def _may_move(req: Any) -> bool:
    """A pinned placement is the client's, and pages that the request holds already cannot leave."""
    return req.dyncp is None and getattr(req, "dyncp_placement_flexible", False) and not req.kv.holds_kv
