"""Decode server behind prefill servers: from a placement to pages that a prefill server writes to.

SGLang serves its preallocation queue in order and stops at the first request that does not fit. Requests of the ledger are taken out of
that loop: they wait for their reservation, as on a server that prefills by itself (step/admission.py), and hold up nobody.
"""

from __future__ import annotations

from collections.abc import Callable
from http import HTTPStatus
from typing import Any

import torch

from sglang_dcp.ledger.positions import token_ids
from sglang_dcp.upstream.step.admission import reserved, takes_over
from sglang_dcp.upstream.step.attached import after, around, before
from sglang_dcp.upstream.step.looking_again import note_blocked
from sglang_dcp.upstream.step.managed import is_managed
from sglang_dcp.upstream.step.prefixes import protect_borrowed
from sglang_dcp.upstream.step.queued import with_pages
from sglang_dcp.upstream.step.retention import prefix_tokens
from sglang_dcp.upstream.step.runtime import Runtime


def bootstrap_address(original: Callable[..., str], req: Any) -> str:
    """AROUND _bootstrap_addr: SGLang takes a request that names no prefill server as one for its fake transfer, and ends at its address."""
    return "" if req.bootstrap_host is None else original(req)


@around
def end_without_kv(runtime: Runtime, original: Callable[..., None], req: Any, error_message: str, status_code: Any = None) -> None:
    """AROUND prepare_abort of a decode server: whose K/V does not come, because its prefill server is gone or for what reason ever, may ask
    again (HTTP 503). SGLang answers 500."""
    original(req, error_message, HTTPStatus.SERVICE_UNAVAILABLE if status_code == HTTPStatus.INTERNAL_SERVER_ERROR else status_code)


@around
def exceeds_capacity(runtime: Runtime, original: Callable[..., bool], queue: Any, req: Any) -> bool:
    """AROUND DecodePreallocQueue._check_if_req_exceed_kv_capacity: the main process has refused what no placement can hold."""
    return False if req.dyncp_placement is not None else original(queue, req)


@after
def take_ready(runtime: Runtime, result: None, queue: Any, *args: Any, **kwargs: Any) -> None:
    """AFTER DecodePreallocQueue._update_handshake_waiters: who has met its prefill server and is the ledger's leaves SGLang's loop, which
    follows. Those whose pages are there begin their transfer."""
    ready = [entry for entry in queue.queue if entry.waiting_for_input and (is_of_ledger(entry.req) or takes_over(runtime, entry.req))]
    begun = []
    for entry in ready:
        # The next poll says so again.
        entry.waiting_for_input = False
        if not entry.req.finished() and reserved(runtime, entry.req) and begin_transfer(queue, entry):
            begun.append(entry)
    if begun:
        gone = {id(entry) for entry in begun}
        queue.queue = [entry for entry in queue.queue if id(entry) not in gone]
        runtime.queues.preallocated += begun


def is_of_ledger(req: Any) -> bool:
    placement = req.dyncp_placement
    return placement is not None and (not placement.is_local or is_managed(req))


def begin_transfer(queue: Any, entry: Any) -> bool:
    """Gives the request a row of its pages' token ids and tells the prefill server where to write: behind the pages of an earlier turn that
    it has taken over. False: no row, or no slot for the first token, is free."""
    if not has_row_and_slot(queue):
        return False
    req, page_size = entry.req, queue.token_to_kv_pool_allocator.page_size
    ids, num_tokens = queue._pre_alloc(req), queue._rebootstrap_prefill_len(req)
    # What has decoded before is computed and sent whole, as by SGLang with a prefix cache of its own.
    kept = 0 if entry.is_rebootstrap else prefix_tokens(req, page_size)
    protect_borrowed(req, page_size)
    queue._send_kv_metadata(entry, ids[kept:num_tokens], page_size, None, decode_prefix_len=kept)
    return True


@before
def begin_behind_prefix(runtime: Runtime, batch: Any) -> None:
    """BEFORE ScheduleBatch.prepare_for_prebuilt: their K/V has come. SGLang has just asked a tree that knows no prefix of them, and would
    free what they read of others."""
    page_size = runtime.participant.page_size
    for req in filter(is_managed, batch.reqs):
        req.prefix_len = prefix_tokens(req, page_size)
        protect_borrowed(req, page_size)


def has_row_and_slot(queue: Any) -> bool:
    return queue.req_to_token_pool.available_size() > 0 and queue.req_to_metadata_buffer_idx_allocator.available_size() > 0


@around
def allocate(runtime: Runtime, original: Callable[..., Any], queue: Any, allocator: Any, **call: Any) -> torch.Tensor:
    """AROUND DecodePreallocQueue._alloc_for_decode_prealloc: token ids of a managed request's own pages."""
    req = call["req"]
    if not is_managed(req):
        # It may get pages of a request that ended since the last step, and fail ahead of the next one.
        runtime.participant.homes.forget_closed()
        return original(queue, allocator, **call)
    req.kv.kv_allocated_len = call["fill_len"]
    return torch.from_numpy(token_ids(runtime.participant.ids, req.dyncp, 0, call["fill_len"])).to(allocator.device)


@around
def pop_preallocated(runtime: Runtime, original: Callable[..., Any], queue: Any, *args: Any, **kwargs: Any) -> tuple[list[Any], list[Any]]:
    """AROUND DecodePreallocQueue.pop_preallocated: those of the ledger come first; the local request that found no room is noted."""
    begun, failed = original(queue, *args, **kwargs)
    ours, runtime.queues.preallocated = runtime.queues.preallocated, []
    short_of_rows = not has_row_and_slot(queue)
    blocked = None if short_of_rows else next((entry.req for entry in queue.queue if entry.waiting_for_input), None)
    if blocked is not None:
        note_blocked(runtime, blocked)
    elif runtime.queues.blocked is not None:
        runtime.queues.blocked.dyncp_blocked_since = None
        runtime.queues.blocked = None
    return ours + begun, failed


# ---- what SGLang counts of the own pool


@after
def leave_withheld(runtime: Runtime, result: int, queue: Any, *args: Any, **kwargs: Any) -> int:
    """AFTER DecodePreallocQueue._allocatable_token_budgets: pages promised to a reservation, and those left to growth, are no longer there
    for local requests."""
    return result - runtime.participant.withheld_pages * runtime.participant.page_size


@after
def count_active(runtime: Runtime, result: int, queue: Any, *args: Any, **kwargs: Any) -> int:
    """AFTER DecodePreallocQueue._active_req_count: SGLang reserves tokens of output for each; the ledger's grow where there is room."""
    scheduler = runtime.scheduler
    return result - sum(is_managed(req) for req in (*scheduler.running_batch.reqs, *with_pages(scheduler)))


@around
def space_for_one(runtime: Runtime, original: Callable[..., int], queue: Any, *args: Any, **kwargs: Any) -> int:
    """AROUND DecodePreallocQueue._need_space_for_single_req: SGLang keeps room for the longest output of one request. Here it may grow
    elsewhere."""
    return original(queue, *args, **kwargs) if runtime.participant.limits.max_degree == 1 else 0


@around
def required_tokens(
    runtime: Runtime, original: Callable[..., int], queue: Any, req: Any, allocated_tokens: int, prefix_len: int, retractable_tokens: int
) -> int:
    """AROUND DecodePreallocQueue._required_admission_tokens: never more than the pool holds, or the request would wait for ever, and those
    behind it."""
    participant = runtime.participant
    pool = participant.num_pages * participant.page_size
    if participant.limits.max_degree == 1:
        return min(original(queue, req, allocated_tokens, prefix_len, retractable_tokens), pool)
    return min(allocated_tokens + min(queue.num_reserved_decode_tokens, req.sampling_params.max_new_tokens), pool)
