"""A request that has no page for its next token sits out: it keeps its pages and its row, and comes back when the page is there."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from types import SimpleNamespace
from typing import Any

from sglang_dcp.ledger.page_ids import Page
from sglang_dcp.upstream.pool.page_audit import check_when_due
from sglang_dcp.upstream.step.admission import keep_place_in_order
from sglang_dcp.upstream.step.binding import Binding, current
from sglang_dcp.upstream.step.instance import is_managed
from sglang_dcp.upstream.step.parked_row import take_row
from sglang_dcp.upstream.step.retraction import drop_aborted, release_finished, retract_victims

GROW_AHEAD_TOKENS = 8
"""A request asks for its next remote tail page this many tokens before it needs it: a grant takes two steps to arrive."""


def get_next_batch(original: Callable[..., Any], scheduler: Any, running_batch: Any, last_batch: Any) -> Any:
    """AROUND Scheduler.get_next_batch_to_run: retractions that the last step ordered, then requests that got their tail page rejoin."""
    binding = current()
    if binding is not None:
        check_when_due(binding)
        if binding.parked or binding.instance.victims:
            release_finished(binding)
            drop_aborted(binding)
            retract_victims(binding)
            running_batch = rejoin(binding, running_batch)
    return original(scheduler, running_batch=running_batch, last_batch=last_batch)


def rejoin(binding: Binding, running_batch: Any) -> Any:
    """The running batch with the rows of those that got their page."""
    back = [req for req in binding.parked if not req.finished() and has_room(binding, req)]
    binding.parked = [req for req in binding.parked if req not in back and not req.finished()]
    for req in back:
        row, req.dyncp_parked_row = req.dyncp_parked_row, None
        if running_batch.is_empty():
            running_batch = row
        else:
            running_batch.merge_batch(row)
    return running_batch


def update_running_batch(original: Callable[..., Any], scheduler: Any, batch: Any) -> Any:
    """AROUND Scheduler.update_running_batch: whoever has no page for the next token sits out until it gets one."""
    binding = current()
    if binding is None or batch.is_empty():
        return original(scheduler, batch)
    began = perf_counter()
    binding.instance.pool.settle_decode_claims()
    leave = find_leavers(binding, batch)
    binding.host_clock.spent("secure", perf_counter() - began)
    if leave:
        sit_out(binding, batch, leave)
        if batch.is_empty():
            batch.batch_is_full = False
            return batch
    return original(scheduler, batch)


def sit_out(binding: Binding, batch: Any, places: set[int]) -> None:
    """Takes rows out of a decode batch; each is kept as it stands, on its request."""
    for place in sorted(places):
        req = batch.reqs[place]
        req.dyncp_parked_row = take_row(batch, place)
        binding.parked.append(req)
    batch.filter_batch(keep_indices=[place for place in range(len(batch.reqs)) if place not in places])


def find_leavers(binding: Binding, batch: Any) -> set[int]:
    """Places in the batch of those that have no page for their next token.

    Asked are those that `secure_next_token` has something to do for: who ends a page now, and who will soon where the last step left
    the pool full. All others have room on the page of their last token. With two free pages for every request no local one misses its own.
    """
    reqs, pool = batch.reqs, binding.instance.pool
    ahead = 0 if binding.givable_pages else GROW_AHEAD_TOKENS
    places = binding.own_batch.near_page_end(reqs, batch.seq_lens_cpu, ahead)
    if places and pool.has_free(2 * len(reqs)):
        places = [i for i in places if is_managed(reqs[i])]
    if not places:
        return set()
    # Who ends with the step in flight needs no page more. SGLang is asked about these few: the question costs by the request.
    few = [reqs[i] for i in places]
    ending = any(req.next_output_finishes_by_length() for req in few)
    finishing = set(binding.scheduler._reqs_finishing_inflight(SimpleNamespace(reqs=few))) if ending else ()
    return {i for i in places if reqs[i] not in finishing and not secure_next_token(binding, reqs[i])}


def secure_next_token(binding: Binding, req: Any) -> bool:
    """Makes sure that the request's next token has a page. False: it must sit out (and has asked for one)."""
    instance, page_size = binding.instance, binding.instance.page_size
    length = req.kv.kv_allocated_len
    if not is_managed(req):
        if length % page_size or instance.pool.claim_decode_page():
            return True
        adopt(binding, req)
    request = req.dyncp
    if length // page_size < len(request.pages):
        if len(request.pages) * page_size - length <= GROW_AHEAD_TOKENS and not instance.pool.num_givable_pages():
            instance.ask_growth(request, stuck=False)
        return request.pages[length // page_size] is not None
    if instance.grow_at_home(request):
        return True
    instance.ask_growth(request, stuck=True)
    return False


def has_room(binding: Binding, req: Any) -> bool:
    index = req.kv.kv_allocated_len // binding.instance.page_size
    return index < len(req.dyncp.pages) and req.dyncp.pages[index] is not None


def adopt(binding: Binding, req: Any) -> None:
    """A local request outgrew the pool: the ledger takes over its pages, so that the next one may lie elsewhere."""
    instance, page_size = binding.instance, binding.instance.page_size
    row = binding.scheduler.req_to_token_pool.req_to_token[req.kv.req_pool_idx, : req.kv.kv_allocated_len : page_size]
    pages = [Page(instance.rank, int(token_id) // page_size) for token_id in row.tolist()]
    req.dyncp = instance.open_request()
    keep_place_in_order(req)
    instance.homes.adopt(req.dyncp, pages, req.kv.cache_protected_len // page_size)
    # Its prefix may be in the tree, what it adds from now on must not enter.
    req.skip_radix_cache_insert = True
