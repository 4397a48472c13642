"""A local request that waits while another instance has room: its pages are asked for there. The home stays the same.

One that waits for very long is overtaken: asks take the pages that it waits for, as soon as they are free. So it asks for them too, and has
its turn (ledger/reservations.py).
"""

from __future__ import annotations

from typing import Any

from sglang_dcp.ledger.promise_turns import LONG_WAIT_STEPS
from sglang_dcp.policy.split import num_pages
from sglang_dcp.policy.types import Placement
from sglang_dcp.upstream.step.admission import ask_reservation, keep_out_of_prefix_cache
from sglang_dcp.upstream.step.queued import is_without_pages
from sglang_dcp.upstream.step.runtime import Runtime

PATIENCE_STEPS = 8
"""Steps that a request waits for its own pool first: there it may use the prefix cache, and costs no exchange."""
OVERTAKEN_STEPS = 2 * LONG_WAIT_STEPS
"""Steps after which it asks for pages of its own pool: it has had as long a time with what others leave to growth as without."""


def ask_elsewhere(runtime: Runtime) -> None:
    """The local request that found no room last becomes an ask of the ledger once it has waited long enough and an instance has room
    beyond its promises, or once it has been overtaken. One such ask is open at a time: what it is granted changes the room of the next."""
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
    moves = bool(others) and getattr(req, "dyncp_placement_flexible", False)  # a pinned placement is the client's
    if not (moves or _is_overtaken(runtime, req)):
        return
    if not _may_ask(req) or not is_without_pages(runtime.scheduler, req):
        return
    runtime.queues.blocked = None
    if moves:
        rank = max(others, key=lambda rank: (participant.room_for_guests(rank), -rank))
        req.dyncp_placement = Placement(participant.rank, (rank,), (num_tokens,))
    keep_out_of_prefix_cache(req)
    ask_reservation(runtime, req)
    runtime.queues.asked_elsewhere = req.dyncp.handle


def _is_overtaken(runtime: Runtime, req: Any) -> bool:
    """Where nothing is the ledger's, local requests are served in SGLang's order, and the prefix cache is theirs."""
    participant = runtime.participant
    return participant.step - req.dyncp_blocked_since > OVERTAKEN_STEPS and bool(len(participant.guests) or len(participant.homes))


def _may_ask(req: Any) -> bool:
    """Nothing says where one without a placement may lie, and pages that a request holds already cannot leave."""
    return req.dyncp is None and req.dyncp_placement is not None and not req.kv.holds_kv
