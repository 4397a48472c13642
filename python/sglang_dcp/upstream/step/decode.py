"""Decode steps of requests whose pages come from the ledger: allocation, growth, sitting out, retraction."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import torch

from sglang_dcp.ledger.page_ids import Page
from sglang_dcp.policy.types import Placement
from sglang_dcp.upstream.pool.page_audit import check_when_due
from sglang_dcp.upstream.step.admission import keep_out_of_prefix_cache, keep_place_in_order
from sglang_dcp.upstream.step.binding import Binding, current
from sglang_dcp.upstream.step.instance import is_managed

GROW_AHEAD_TOKENS = 8
"""A request asks for its next remote tail page this many tokens before it needs it: a grant takes two steps to arrive."""


def get_next_batch(original: Callable[..., Any], scheduler: Any, running_batch: Any, last_batch: Any) -> Any:
    """AROUND Scheduler.get_next_batch_to_run: retractions that the last step ordered, then requests that got their tail page rejoin."""
    binding = current()
    if binding is not None:
        check_when_due(binding)
    if binding is not None and (binding.parked or binding.instance.victims):
        release_finished(binding)
        drop_aborted(binding)
        retract_victims(binding)
        back = [req for req in binding.parked if not req.finished() and has_room(binding, req)]
        binding.parked = [req for req in binding.parked if req not in back and not req.finished()]
        if back:
            rejoined = build_decode_batch(scheduler, back)
            if running_batch.is_empty():
                running_batch = rejoined
            else:
                running_batch.merge_batch(rejoined)
    return original(scheduler, running_batch=running_batch, last_batch=last_batch)


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
        binding.parked += [req for i, req in enumerate(batch.reqs) if i in leave]
        batch.filter_batch(keep_indices=[i for i in range(len(batch.reqs)) if i not in leave])
        if batch.is_empty():
            batch.batch_is_full = False
            return batch
    return original(scheduler, batch)


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


def build_decode_batch(scheduler: Any, reqs: list[Any]) -> Any:
    """A decode batch of requests that hold KV for all but their last token."""
    from sglang.srt.managers.schedule_batch import ScheduleBatch
    from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo

    batch = ScheduleBatch.init_new(
        reqs=reqs,
        req_to_token_pool=scheduler.req_to_token_pool,
        token_to_kv_pool_allocator=scheduler.token_to_kv_pool_allocator,
        tree_cache=scheduler.tree_cache,
        model_config=scheduler.model_config,
        enable_overlap=scheduler.enable_overlap,
        spec_algorithm=scheduler.spec_algorithm,
    )
    rows = [req.kv.req_pool_idx for req in reqs]
    lengths = [req.kv.kv_committed_len for req in reqs]
    last_tokens = torch.tensor([req.output_ids[-1] for req in reqs], dtype=torch.int64, device=scheduler.device)
    batch.req_pool_indices = torch.tensor(rows, dtype=torch.int64, device=scheduler.device)
    batch.req_pool_indices_cpu = torch.tensor(rows, dtype=torch.int64)
    batch.seq_lens = torch.tensor(lengths, dtype=torch.int64, device=scheduler.device)
    batch.seq_lens_cpu = torch.tensor(lengths, dtype=torch.int64)
    batch.orig_seq_lens = torch.tensor(lengths, dtype=torch.int32, device=scheduler.device)
    batch.seq_lens_sum = sum(lengths)
    if scheduler.enable_overlap:
        scheduler.future_map.stash_bonus_tokens(batch.req_pool_indices, last_tokens)
        batch.input_ids = None
    else:
        batch.input_ids = last_tokens
    batch.multimodal_inputs = [req.multimodal_inputs for req in reqs]
    if batch.return_logprob:
        batch.top_logprobs_nums = [req.logprob.top_logprobs_num for req in reqs]
        batch.token_ids_logprobs = [req.logprob.token_ids_logprob for req in reqs]
    batch.sampling_info = SamplingBatchInfo.from_schedule_batch(batch, scheduler.model_config.vocab_size)
    return batch


# ---- retraction and abort


def retract_victims(binding: Binding) -> None:
    """Sends the requests that the last step named back to the queue; they start over when their pages are there."""
    from sglang.srt.managers.schedule_batch import release_req

    scheduler = binding.scheduler
    for request in binding.instance.victims:
        req = next((r for r in binding.parked if r.dyncp is request and not r.finished()), None)
        if req is None:
            continue
        binding.parked.remove(req)
        release_req(
            req=req,
            remaing_req_count=len(scheduler.running_batch.reqs),
            req_to_token_pool=scheduler.req_to_token_pool,
            token_to_kv_pool_allocator=scheduler.token_to_kv_pool_allocator,
            tree_cache=scheduler.tree_cache,
            hisparse_coordinator=None,
        )
        release_unwritten(binding, req)
        req.dyncp = None
        place_again(binding, req)
        scheduler._add_request_to_queue(req, is_retracted=True)
    binding.instance.victims = []


def release_unwritten(binding: Binding, req: Any) -> None:
    """Closes the books of a request that owns no written page: freeing its row does not pass the allocator.

    That is a local one which was taken over with all its tokens in prefix-cache pages and has not stored a token since.
    """
    if req.dyncp.handle in binding.instance.homes.requests:
        binding.instance.release(req.dyncp)


def release_finished(binding: Binding) -> None:
    """Requests that finished while they sat out: by the result of the step before, or by an abort that SGLang carried out."""
    for req in binding.parked:
        if req.finished():
            release_unwritten(binding, req)


def place_again(binding: Binding, req: Any) -> None:
    """A retracted request that no longer fits its pool is spread: over all instances, the split left to the grant."""
    instance = binding.instance
    page_size, total = instance.page_size, len(req.origin_input_ids) + len(req.output_ids)
    placement = req.dyncp_placement
    if (placement is None or placement.is_local) and total + 2 * page_size <= instance.num_pages * page_size:
        return
    pages = -(-total // page_size)
    others = [rank for rank in range(instance.num_instances) if rank != instance.rank]
    order = sorted(others, key=lambda rank: (int(instance.kv_tokens[rank]), rank))
    degree = min(instance.config.max_degree or instance.num_instances, instance.num_instances, pages)
    shards = [*order[: degree - 1], instance.rank]
    share = pages // degree
    tokens = [share * page_size] * (degree - 1)
    req.dyncp_placement = Placement(instance.rank, tuple(shards), (*tokens, total - sum(tokens)))
    req.dyncp_placement_flexible = True
    keep_out_of_prefix_cache(req)


def after_abort(result: Any, scheduler: Any, recv_req: Any) -> None:
    """AFTER Scheduler.abort_request: it looks at running and waiting requests, those that sit out are ours."""
    binding = current()
    if binding is None:
        return
    binding.aborted |= {req.rid for req in binding.parked if recv_req.abort_all or req.rid.startswith(recv_req.rid)}


def drop_aborted(binding: Binding) -> None:
    from sglang.srt.managers.schedule_batch import FINISH_ABORT
    from sglang.srt.managers.scheduler import _make_abort_req
    from sglang.srt.mem_cache.common import release_kv_cache

    scheduler = binding.scheduler
    for req in [req for req in binding.parked if req.rid in binding.aborted or req.to_finish is not None]:
        if req.finished():
            continue
        binding.parked.remove(req)
        req.finished_reason = req.to_finish or FINISH_ABORT()
        scheduler._release_aborted_request(req)
        release_kv_cache(req, scheduler.tree_cache, checkpoint=False)
        release_unwritten(binding, req)
        scheduler.send_abort_output(_make_abort_req(req), req)
    binding.aborted.clear()


# ---- allocation


def alloc_extend(original: Callable[..., Any], tree_cache: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    """AROUND alloc_paged_token_slots_extend: managed requests take the token ids of their reserved pages, the others the stock path."""
    call = _bind_arguments(original, tree_cache, *args, **kwargs)
    batch, binding = call["batch"], current()
    if binding is None or batch is None or not any(is_managed(req) for req in batch.reqs):
        return original(tree_cache, *args, **kwargs)
    prefix_lens, seq_lens = call["prefix_lens_cpu"].tolist(), call["seq_lens_cpu"].tolist()
    local = [i for i, req in enumerate(batch.reqs) if not is_managed(req)]
    parts: dict[int, torch.Tensor] = {}
    if local:
        counts = [seq_lens[i] - prefix_lens[i] for i in local]
        stock = original(
            **{
                **call,
                **{name: call[name][local] for name in ("prefix_lens", "prefix_lens_cpu", "seq_lens", "seq_lens_cpu", "last_loc")},
                "extend_num_tokens": sum(counts),
                "req_pool_indices": None,
            }
        )
        parts.update(zip(local, stock.split(counts), strict=True))
    for i, req in enumerate(batch.reqs):
        if i not in parts:
            parts[i] = torch.from_numpy(binding.instance.token_ids(req.dyncp, prefix_lens[i], seq_lens[i])).to(batch.device)
    return torch.cat([parts[i] for i in range(len(batch.reqs))])


def alloc_decode(
    original: Callable[..., Any],
    tree_cache: Any,
    seq_lens: torch.Tensor,
    seq_lens_cpu: torch.Tensor,
    last_loc: torch.Tensor,
    token_per_req: int = 1,
    req_pool_indices: torch.Tensor | None = None,
    batch: Any = None,
) -> torch.Tensor:
    """AROUND alloc_paged_token_slots_decode: a managed request's next page is not taken from the pool.

    Within a page a token follows the last one, wherever the page lies, and stock counts on from the last token's id. So stock allocates
    every step but those in which a managed request begins a page.
    """
    binding = current()
    if binding is None or batch is None:
        return original(tree_cache, seq_lens, seq_lens_cpu, last_loc, token_per_req, req_pool_indices, batch)
    began, instance, reqs = perf_counter(), binding.instance, batch.reqs
    instance.pool.settle_decode_claims()
    begin = binding.own_batch.beginning_page(reqs, seq_lens_cpu)
    told = [(i, instance.token_id(reqs[i].dyncp, reqs[i].kv.kv_allocated_len)) for i in begin if is_managed(reqs[i])]
    ids = instance.pool.alloc_decode_beside(last_loc, told, [i for i in begin if not is_managed(reqs[i])]) if told else None
    binding.host_clock.spent("allocate", perf_counter() - began)
    return original(tree_cache, seq_lens, seq_lens_cpu, last_loc, token_per_req, req_pool_indices, batch) if ids is None else ids


def _bind_arguments(original: Callable[..., Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
    import inspect

    bound = inspect.signature(original).bind(*args, **kwargs)
    bound.apply_defaults()
    return dict(bound.arguments)
