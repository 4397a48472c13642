"""From placement to first chunk: requests with a remote shard wait for their reservation, all or nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from sglang_dcp.ledger.homes import HomeRequest
from sglang_dcp.ledger.retention import Match
from sglang_dcp.policy.expected_output import expected_new_tokens
from sglang_dcp.policy.split import num_pages
from sglang_dcp.policy.split_limits import Split, SplitLimits
from sglang_dcp.upstream.router.placement_hint import read_placement
from sglang_dcp.upstream.step import retention
from sglang_dcp.upstream.step.attached import around, current
from sglang_dcp.upstream.step.looking_again import holds_up_others, note_blocked
from sglang_dcp.upstream.step.managed import is_managed
from sglang_dcp.upstream.step.queued import without_pages
from sglang_dcp.upstream.step.runtime import Runtime
from sglang_dcp.upstream.step.sharing import waits_for_another


def attach_placement(req: Any, scheduler: Any, recv_req: Any, *args: Any, **kwargs: Any) -> Any:
    """AFTER Scheduler._create_generation_req: keeps the router's placement on the request."""
    hint, runtime = read_placement(recv_req.kv_hints), current()
    req.dyncp = req.dyncp_parked_row = None
    req.dyncp_placement = None if hint is None else hint.placement
    req.dyncp_placement_flexible = hint is not None and hint.flexible
    req.dyncp_prefix_pages = req.dyncp_num_late = 0
    req.dyncp_extra_key = req.extra_key
    if hint is None:
        if runtime is not None:
            refuse_beyond_pool(runtime, req)
        return req
    if runtime is not None:
        runtime.queues.placements_taken_in = hint.number
    if not hint.placement.is_local:
        keep_out_of_prefix_cache(req)
        if runtime is not None:
            scheduler.running_batch.batch_is_full = False  # it needs nothing of what that waits for
    return req


def refuse_beyond_pool(runtime: Runtime, req: Any) -> None:
    """A request without a placement lives in the own pool. SGLang's limits are those of the cluster (capacity.py), so a longer one would
    wait for ever, and those behind it with it."""
    participant, num_tokens = runtime.participant, len(req.origin_input_ids)
    limit = (participant.num_pages - 1) * participant.page_size
    if num_tokens > limit:
        req.set_finish_with_abort(
            f"The input ({num_tokens} tokens) has no placement and exceeds {limit} tokens, what the KV pool of instance {participant.rank} "
            "holds beside a page of output (--max-total-tokens); the router's log tells why it was not placed"
        )


def keep_out_of_prefix_cache(req: Any) -> None:
    """Remote page ids must not enter the tree, and a prefix found there would not fit the reservation."""
    req.skip_radix_cache_insert = True
    req.extra_key = f"dyncp:{req.rid}"


@around
def add_one_req(
    runtime: Runtime, original: Callable[..., Any], adder: Any, req: Any, has_chunked_req: bool, truncation_align_size: int | None
) -> Any:
    """AROUND PrefillAdder.add_one_req.

    A request with a remote shard is passed over (the queue behind it goes on) until its pages are there; then it is charged nothing,
    its pages have left the pools already. A local one is charged as in stock, where its output could not outgrow the pool.
    """
    placement = getattr(req, "dyncp_placement", None)
    if placement is None or (placement.is_local and req.dyncp is None and not takes_over(runtime, req)):
        return _add_local(original, adder, runtime, req, has_chunked_req, truncation_align_size)
    from sglang.srt.managers.schedule_policy import AddReqResult

    if not reserved(runtime, req):
        return AddReqResult.CONTINUE
    # SGLang keeps one unfinished prefill at a time, and relies on its token budget to stop at that; ours is unbounded. The round ends:
    # those behind would only ask early, and hold pages that they cannot use yet.
    if has_chunked_req or adder.new_chunked_req is not None:
        return AddReqResult.OTHER
    retention.begin_behind_prefix(req, runtime.participant.page_size)
    with _charge_nothing(adder):
        return original(adder, req, has_chunked_req, truncation_align_size)


def takes_over(runtime: Runtime, req: Any) -> bool:
    """Whether a request that would fit its own pool goes on from a retained sequence, which is longer than what SGLang's tree has of it.
    Never without a placement: the router had a fault, and nothing says where the request may lie."""
    if req.dyncp_placement is None:
        return False
    match = retention.find(runtime, req)
    if match is None or match.num_pages * runtime.participant.page_size <= req.prefix_len:
        return False
    keep_out_of_prefix_cache(req)
    return True


def _add_local(original: Callable[..., Any], adder: Any, runtime: Runtime, req: Any, *args: Any, **kwargs: Any) -> Any:
    """Stock admission. A local request that does not fit ends SGLang's round; where some of the ledger's wait it must not: they may hold
    the very pages that it waits for, or need none of them. Then the round goes on, past further local requests. SGLang wants a token more
    than it charges: a prompt that ends a page and leaves one of the pool, which placement finds room for, would wait for ever."""
    from sglang.srt.managers.schedule_policy import AddReqResult

    if getattr(adder, "dyncp_local_blocked", False):
        return AddReqResult.CONTINUE
    with _charge_expected_output(req, runtime), _admit_like_others(req, runtime), _charge_less(adder, 1):
        result = original(adder, req, *args, **kwargs)
    if result is AddReqResult.NO_TOKEN:
        note_blocked(runtime, req)
        if holds_up_others(runtime):
            adder.dyncp_local_blocked = True
            return AddReqResult.CONTINUE
    elif runtime.queues.blocked is req:
        runtime.queues.blocked = req.dyncp_blocked_since = None
    return result


@around
def add_chunked_req(runtime: Runtime, original: Callable[..., Any], adder: Any, req: Any) -> Any:
    """AROUND PrefillAdder.add_chunked_req: further chunks of a reserved request cost nothing either. A local one that has begun comes
    before what was promised since (`free_pages` in sync.py keeps its pages), so what new ones leave does not shorten its chunks."""
    if is_managed(req):
        with _charge_nothing(adder):
            return original(adder, req)
    with _charge_less(adder, runtime.participant.withheld_pages * runtime.participant.page_size):
        return original(adder, req)


@around
def running_offset(runtime: Runtime, original: Callable[..., Any], adder: Any, req: Any) -> Any:
    """AROUND PrefillAdder._get_running_request_total_token_offset: what a running request may still take from this pool."""
    if is_managed(req):
        return runtime.participant.page_size
    with _charge_expected_output(req, runtime):
        return max(0, original(adder, req))


def reserved(runtime: Runtime, req: Any) -> bool:
    """Whether the pages of a request are there; asks for them once."""
    request: HomeRequest | None = req.dyncp
    if request is not None:
        return request.ready
    if not waits_for_another(runtime, req):
        ask_reservation(runtime, req)
    return False


def ask_reservation(runtime: Runtime, req: Any) -> None:
    """The request is the ledger's from now on."""
    req.dyncp = request = runtime.participant.open_request()
    request.owner = req
    keep_place_in_order(req)
    runtime.queues.waiting[request.handle] = req
    ask_pages(runtime, req, retention.find(runtime, req, shares=True))


def ask_pages(runtime: Runtime, req: Any, match: Match | None) -> None:
    """Asks for all pages of a request, or for those behind the retained sequence that it would take over."""
    participant = runtime.participant
    segments = page_segments(req, participant.page_size, participant.limits)
    behind = None if match is None else retention.segments_behind(req, match, sum(pages for _, pages in segments), participant.limits)
    if behind is None:
        match = None
    req.dyncp_prefix_pages = 0 if match is None else match.num_pages
    participant.ask_admission(req.dyncp, segments if behind is None else behind, flexible=req.dyncp_placement_flexible, match=match)


def ask_again(runtime: Runtime) -> None:
    """Waiting requests whose retained sequence was evicted in the last step ask for all their pages, in their old place."""
    lost, runtime.participant.retention.lost = runtime.participant.retention.lost, []
    for request in lost:
        if request.handle in runtime.queues.waiting:
            ask_pages(runtime, request.owner, None)


def keep_place_in_order(req: Any) -> None:
    """A request that starts over keeps its place in the total order: else it would be the youngest, and the victim, for ever."""
    req.dyncp.born = req.dyncp_born = min(req.dyncp.born, getattr(req, "dyncp_born", req.dyncp.born))


def page_segments(req: Any, page_size: int, limits: SplitLimits) -> Split:
    """Pages per shard: the placement's split of the prompt, what the request has generated so far and one tail page on the tail, brought
    within the limits so that the ask fits once the pools are empty enough. ValueError for a request that no pools can hold."""
    placement = req.dyncp_placement
    num_tokens = len(req.origin_input_ids) + len(req.output_ids)
    pages = min(num_pages(num_tokens, page_size) + 1, max(limits.reach_pages, num_pages(num_tokens, page_size)))
    heads = zip(placement.shards, (max(1, tokens // page_size) for tokens in placement.shard_tokens[:-1]), strict=False)
    split = limits.complete(placement.home, [*heads, (placement.tail, 1)], max(pages, placement.degree))
    if split is None:
        raise ValueError(f"{req.rid}: {num_tokens} tokens ({pages} pages) exceed {limits.reach_pages} pages, what one request may hold")
    return split


def sweep_waiting(runtime: Runtime) -> None:
    """Gives back reservations of requests that left the queue without ever running (abort, timeout, queue limit)."""
    if not runtime.queues.waiting:
        return
    # By identity: two tokenizer workers, or a client that asks again, may give two requests one id.
    queued = {id(req) for req in without_pages(runtime.scheduler)}
    for handle, req in list(runtime.queues.waiting.items()):
        if req.kv.holds_kv or req.dyncp is None or req.dyncp.handle != handle:
            del runtime.queues.waiting[handle]
        elif id(req) not in queued:
            retention.end_waiting(runtime, req)
            req.dyncp = None
            del runtime.queues.waiting[handle]


class _Unbounded:
    """Stands in for SGLang's PrefillBudget where pages are reserved already: chunk sizes are bounded by compute alone."""

    load_back_needs_full_tokens = False
    remaining_total = remaining_current = 1 << 40
    remaining_swa = 0
    total_offset = current_offset = swa_offset = 0

    def has_capacity(self) -> bool:
        return True

    def check_prefill(self, *, chunk_limit: int | None, **_: Any) -> tuple[bool, int | None]:
        return True, chunk_limit

    def can_allocate_prefill(self, **_: Any) -> bool:
        return True

    def available_chunk_tokens(self, chunk_limit: int) -> int:
        return chunk_limit

    def fit_chunk(self, *, chunk_limit: int, **_: Any) -> int:
        return chunk_limit

    def prepare_load_back(self, **_: Any) -> bool:
        return True

    def reserve(self, *_: Any, **__: Any) -> None:
        return None


@contextlib.contextmanager
def _charge_nothing(adder: Any) -> Iterator[None]:
    budget, adder.memory_budget = adder.memory_budget, _Unbounded()
    try:
        yield
    finally:
        adder.memory_budget = budget


@contextlib.contextmanager
def _charge_less(adder: Any, tokens: int) -> Iterator[None]:
    budget = adder.memory_budget
    budget.total_offset -= tokens
    budget.current_offset -= tokens
    try:
        yield
    finally:
        budget.total_offset += tokens
        budget.current_offset += tokens


@contextlib.contextmanager
def _charge_expected_output(req: Any, runtime: Runtime) -> Iterator[None]:
    """As placement counts it (policy/expected_output.py), beyond what the request has generated, and never more than a pool holds. One
    that runs past this estimate and its pool grows elsewhere."""
    params, participant = req.sampling_params, runtime.participant
    pool, generated = participant.num_pages * participant.page_size, len(req.output_ids)
    limit = max(0, pool - len(req.origin_input_ids) - 2 * participant.page_size - 1)
    asked = params.max_new_tokens
    left = max(0, asked - generated)
    params.max_new_tokens = min(generated + expected_new_tokens(left, participant.limits.max_degree), limit)
    try:
        yield
    finally:
        params.max_new_tokens = asked


@contextlib.contextmanager
def _admit_like_others(req: Any, runtime: Runtime) -> Iterator[None]:
    """Without a prefix cache SGLang admits requests that ignore the end of sequence by a simulation of all full outputs. It knows nothing
    of growth elsewhere."""
    params = req.sampling_params
    ignore_eos = params.ignore_eos
    params.ignore_eos = ignore_eos and runtime.participant.limits.max_degree == 1
    try:
        yield
    finally:
        params.ignore_eos = ignore_eos
