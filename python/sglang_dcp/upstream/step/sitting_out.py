"""A request that has no page for its next token sits out: it keeps its pages and its row, and comes back when the page is there."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from sglang_dcp.ledger.homes import HomeRequest
from sglang_dcp.ledger.page_ids import Page
from sglang_dcp.upstream.step.admission import keep_place_in_order
from sglang_dcp.upstream.step.managed import is_managed
from sglang_dcp.upstream.step.own_batch import GROW_AHEAD_TOKENS
from sglang_dcp.upstream.step.parked_row import take_row
from sglang_dcp.upstream.step.runtime import Runtime
from sglang_dcp.upstream.step.sync import spoken_for


def rejoin(runtime: Runtime, running_batch: Any) -> Any:
    """The running batch with the rows of those that got their page."""
    back = [req for req in runtime.queues.parked if not req.finished() and has_room(runtime, req)]
    runtime.queues.parked = [req for req in runtime.queues.parked if req not in back and not req.finished()]
    for req in back:
        row, req.dyncp_parked_row = req.dyncp_parked_row, None
        if row.sampling_info.penalizer_orchestrator.is_required:
            # The result of the step in flight when it left, if there was one.
            req.dyncp_num_late = len(req.output_ids) - req.dyncp_num_output
        if running_batch.is_empty():
            running_batch = row
        else:
            running_batch.merge_batch(row)
    return running_batch


def sit_out(runtime: Runtime, batch: Any, places: set[int]) -> bool:
    """Takes rows out of a decode batch; each is kept as it stands, on its request. Whether the batch has rows left."""
    for place in sorted(places):
        req = batch.reqs[place]
        req.dyncp_parked_row = take_row(batch, place)
        req.dyncp_num_output = len(req.output_ids) - req.dyncp_num_late
        runtime.queues.parked.append(req)
    batch.filter_batch(keep_indices=[place for place in range(len(batch.reqs)) if place not in places])
    if batch.is_empty():
        batch.batch_is_full = False
        return False
    return True


def find_leavers(runtime: Runtime, batch: Any) -> set[int]:
    """Places in the batch of those that have no page for their next token.

    Asked are those that `secure_next_token` has something to do for: who ends a page now, and who will soon and can have none at home. All
    others have room on the page of their last token. With two free pages for every request no local one misses its own. Between the chunks
    of a local prompt (--prefill-decode-interval) its pages are kept.
    """
    reqs, pool = batch.reqs, runtime.pool
    kept = spoken_for(runtime)
    enough = 2 * len(reqs) + kept
    if runtime.givable_pages and pool.has_free(enough) and runtime.own_batch.is_quiet(reqs):
        return set()
    if kept:
        pool.keep_free(kept)
    places = runtime.own_batch.to_secure(reqs, batch.seq_lens_cpu, home_is_full=not runtime.givable_pages)
    if places and pool.has_free(enough):
        places = [i for i in places if is_managed(reqs[i])]
    # Who has ended is still in the batch; a page claimed for it would be nobody's, and missing where the step's grants are given.
    places = [i for i in places if not reqs[i].finished()]
    if not places:
        return set()
    # Who ends with the step in flight needs no page more either. SGLang is asked about these few: the question costs by the request.
    few = [reqs[i] for i in places]
    ending = any(req.next_output_finishes_by_length() for req in few)
    finishing = set(runtime.scheduler._reqs_finishing_inflight(SimpleNamespace(reqs=few))) if ending else ()
    return {i for i in places if reqs[i] not in finishing and not secure_next_token(runtime, reqs[i])}


def secure_next_token(runtime: Runtime, req: Any) -> bool:
    """Makes sure that the request's next token has a page. False: it must sit out (and has asked for one)."""
    participant, page_size = runtime.participant, runtime.participant.page_size
    length = req.kv.kv_allocated_len
    if not is_managed(req):
        if length % page_size or runtime.pool.claim_decode_page():
            return True
        adopt(runtime, req)
    request = req.dyncp
    if length // page_size < len(request.pages):
        left = len(request.pages) * page_size - length
        if left <= GROW_AHEAD_TOKENS and outlasts(req, left) and not has_page_at_home(runtime, request):
            participant.ask_growth(request, stuck=False)
        return request.pages[length // page_size] is not None
    if participant.grow_at_home(request):
        return True
    participant.ask_growth(request, stuck=True)
    return False


def has_page_at_home(runtime: Runtime, request: HomeRequest) -> bool:
    return runtime.participant.may_grow_at_home(request) and runtime.pool.num_givable_pages() > 0


def outlasts(req: Any, tokens: int) -> bool:
    """Whether the request may write more than `tokens` more. Who ends earlier for another reason than length gives the page that it asked
    for ahead back unused, with the others."""
    more: int = req.sampling_params.max_new_tokens - len(req.output_ids)
    return more > tokens


def has_room(runtime: Runtime, req: Any) -> bool:
    index = req.kv.kv_allocated_len // runtime.participant.page_size
    return index < len(req.dyncp.pages) and req.dyncp.pages[index] is not None


def adopt(runtime: Runtime, req: Any) -> None:
    """A local request outgrew the pool: the ledger takes over its pages, so that the next one may lie elsewhere."""
    participant, page_size = runtime.participant, runtime.participant.page_size
    row = runtime.scheduler.req_to_token_pool.req_to_token[req.kv.req_pool_idx, : req.kv.kv_allocated_len : page_size]
    pages = [Page(participant.rank, int(token_id) // page_size) for token_id in row.tolist()]
    req.dyncp = participant.open_request()
    req.dyncp.owner = req
    keep_place_in_order(req)
    participant.homes.adopt(req.dyncp, pages, req.kv.cache_protected_len // page_size)
    runtime.own_batch.note_taken_over()
    # Its prefix may be in the tree, what it adds from now on must not enter.
    req.skip_radix_cache_insert = True
