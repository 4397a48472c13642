"""Prefix cache of the ledger: which requests leave their pages behind, and which begin with those of an earlier one."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch

from sglang_dcp.ledger.homes import HomeRequest
from sglang_dcp.ledger.positions import token_ids
from sglang_dcp.ledger.prefix_index import page_digests
from sglang_dcp.ledger.retention import Match
from sglang_dcp.policy.prefix_digests import DIGEST_BYTES
from sglang_dcp.policy.split import num_pages
from sglang_dcp.policy.split_limits import Split, SplitLimits
from sglang_dcp.upstream.step.attached import around
from sglang_dcp.upstream.step.managed import is_managed
from sglang_dcp.upstream.step.prefixes import digests_of, is_on, is_plain, namespace_of, protect_borrowed
from sglang_dcp.upstream.step.queued import is_without_pages
from sglang_dcp.upstream.step.runtime import Runtime
from sglang_dcp.upstream.step.sharing import share_with

LOW_WATER_PAGES = 64
"""Most pages that stay free beside retained ones: two for every local request that runs, so that its next token need not wait for an
eviction (growth of managed ones evicts in its own step). Of a small pool at most one part in 32: a few free pages cost a whole sequence."""
FLUSH_SECONDS = 5.0
"""Longest wait of /flush_cache for the pages that other instances hold for this one, which are free a step later."""


# ---- the end of a request


def end_request(runtime: Runtime, request: HomeRequest) -> None:
    """The request's row is freed: its whole pages stay where it ended by itself, else all go."""
    # It may have begun and ended since the last look at who waits: a decode server's first token comes with the K/V.
    runtime.queues.waiting.pop(request.handle, None)
    req = request.owner
    pages = retainable_pages(runtime, request, req) if req is not None else 0
    if not pages:
        runtime.participant.release(request)
        return
    tokens = (req.origin_input_ids + req.output_ids)[: pages * runtime.participant.page_size]
    runtime.participant.finish(request, page_digests(tokens, runtime.participant.page_size, namespace_of(req)), pages)


def retainable_pages(runtime: Runtime, request: HomeRequest, req: Any) -> int:
    """Whole pages of tokens that were computed for sure: the last token never counts, nor what SGLang has not committed."""
    if not is_on(runtime) or request.num_tree_pages or not is_plain(req) or not ended_by_itself(req):
        return 0
    num_tokens = min(req.owned_kv_len(), len(req.origin_input_ids) + len(req.output_ids) - 1)
    return num_tokens // runtime.participant.page_size if num_tokens >= runtime.config.cache_min_tokens else 0


def ended_by_itself(req: Any) -> bool:
    return req.finished() and req.finished_reason.to_json()["type"] in ("stop", "length")


def end_waiting(runtime: Runtime, req: Any) -> None:
    """A request that leaves the queue without having run. What it has taken over is as it was, up to the match."""
    request, pages = req.dyncp, req.dyncp_prefix_pages
    if request.num_kept and pages:
        runtime.participant.finish(request, req.dyncp_digests[: pages * DIGEST_BYTES], pages)
    else:
        runtime.participant.release(request)


# ---- the beginning of one


def find(runtime: Runtime, req: Any, *, shares: bool = False) -> Match | None:
    """The retained sequence that a request may go on from instead of computing its beginning. Asked before its reservation. shares: what a
    running request has is made one if nothing as long is retained."""
    participant = runtime.participant
    if not (shares or len(participant.homes.retained)) or not is_on(runtime) or not is_plain(req):
        return None
    page_size, num_tokens = participant.page_size, len(req.origin_input_ids) + len(req.output_ids)
    digests = digests_of(runtime, req, num_tokens)
    # Which shards a pinned degree gets is the router's choice of the moment; here they are those of the sequence.
    degree = None if req.dyncp_placement_flexible else req.dyncp_placement.degree
    most_pages, total_pages = req._compute_max_prefix_len(num_tokens) // page_size, num_pages(num_tokens, page_size) + 1
    match = participant.retention.find(digests, most_pages, total_pages, degree)
    if shares and share_with(runtime, req, 0 if match is None else match.num_pages, most_pages, degree):
        match = participant.retention.find(digests, most_pages, total_pages, degree)
    return match


def segments_behind(req: Any, match: Match, pages: int, limits: SplitLimits) -> Split | None:
    """Where the pages behind those taken over are asked for, of `pages` in all: at home where the degree allows it, else where the others
    are. None where no such split can ever fit."""
    home, kept = req.dyncp_placement.home, dict(match.kept)
    may_widen = req.dyncp_placement_flexible or len(kept) < req.dyncp_placement.degree
    order = sorted(kept, key=lambda rank: rank == home)
    split = [(rank, kept[rank]) for rank in order]
    if home not in kept and may_widen and pages > match.num_kept:
        split.append((home, 1))
    whole = limits.complete(home, split, pages)
    if whole is None or not limits.fits(home, whole) or any(dict(whole).get(rank, 0) < count for rank, count in match.kept):
        return None
    if not req.dyncp_placement_flexible and len(whole) != req.dyncp_placement.degree:
        return None
    return tuple((rank, count - kept.get(rank, 0)) for rank, count in whole if count > kept.get(rank, 0))


def prefix_tokens(req: Any, page_size: int) -> int:
    """Of the sequence that a managed request has taken over."""
    return req.dyncp_prefix_pages * page_size if req.dyncp.num_kept else 0


def begin_behind_prefix(req: Any, page_size: int) -> None:
    """SGLang computes the prompt from here on. Its own match found nothing: the request has a key of its own."""
    req.prefix_len = req.num_matched_prefix_tokens = prefix_tokens(req, page_size)
    protect_borrowed(req, page_size)


@around
def prefix_device_indices(runtime: Runtime, original: Callable[..., Any], tree_cache: Any, req: Any) -> torch.Tensor:
    """AROUND UnifiedRadixCache.prefix_device_indices: token ids of a prefix that was taken over."""
    if not is_managed(req):
        return original(tree_cache, req)
    return torch.from_numpy(token_ids(runtime.participant.ids, req.dyncp, 0, req.prefix_len)).to(runtime.device)


# ---- room for others, and the flush


def wanted_pages(runtime: Runtime) -> int:
    """Free pages that this instance's own requests need, of retained ones: a low-water mark, or room for the local prompt that found none,
    where evictions make it some."""
    participant, retained = runtime.participant, runtime.participant.table.retained
    rank, req = participant.rank, runtime.queues.blocked
    if not retained.pages[rank]:
        return 0
    num_local = sum(not is_managed(running) for running in runtime.scheduler.running_batch.reqs)
    low = min(LOW_WATER_PAGES, 2 * num_local, max(1, participant.num_pages // 32))
    if req is None or not is_without_pages(runtime.scheduler, req):
        return low
    needed = num_pages(len(req.origin_input_ids) + len(req.output_ids), participant.page_size) + 1
    givable = runtime.pool.num_givable_pages()
    # What is evicted beyond this is left to growth in its place.
    most = givable + retained.evictable[rank] - participant.growth_pages
    return max(low, min(participant.num_pages, givable + needed, most)) if most - participant.promised[rank] >= needed else low


@around
def flush(runtime: Runtime, original: Callable[..., Any], wrapper: Any, recv_req: Any) -> Any:
    """AROUND SchedulerFlushWrapper.handle: sequences are given up first, and the flush waits until the other instances have done so too."""
    participant, queues = runtime.participant, runtime.queues
    if not (len(participant.table.retained) or len(participant.homes.retained)):
        return original(wrapper, recv_req)
    idle = wrapper._is_fully_idle()
    queues.flushing = True
    participant.release_retained()
    if idle and not recv_req.timeout_s:
        recv_req.timeout_s = FLUSH_SECONDS
    answer = original(wrapper, recv_req)
    queues.flushing = wrapper._pending is not None
    return answer


@around
def check_pending_flush(runtime: Runtime, original: Callable[..., Any], wrapper: Any) -> None:
    """AROUND SchedulerFlushWrapper.check_pending: what ended while the flush waits is given up too. Slices of an instance give up in the
    same round: the first one's clock counts. Else one could flush what another keeps."""
    if wrapper._pending is None:
        runtime.queues.flushing = False
        return
    from sglang.srt.distributed.communication_op import attn_cp_tp_broadcast_pyobj

    if runtime.queues.flushing:
        runtime.participant.release_retained()
    request, deadline = wrapper._pending
    (is_over,) = attn_cp_tp_broadcast_pyobj([time.monotonic() >= deadline])
    wrapper._pending = request, -math.inf if is_over else math.inf
    original(wrapper)
    if wrapper._pending is not None:
        wrapper._pending = request, deadline
    runtime.queues.flushing = runtime.queues.flushing and wrapper._pending is not None
