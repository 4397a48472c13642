"""How requests that sit out end early: as the victim that makes room, by an abort or a timeout, or with the step that was in flight."""

from __future__ import annotations

from typing import Any

from sglang_dcp.policy.split import num_pages
from sglang_dcp.policy.types import Placement
from sglang_dcp.upstream.step.admission import keep_out_of_prefix_cache
from sglang_dcp.upstream.step.attached import after
from sglang_dcp.upstream.step.queued import behind_prefill_servers
from sglang_dcp.upstream.step.retention import end_request
from sglang_dcp.upstream.step.runtime import Runtime


def end_parked(runtime: Runtime) -> None:
    """Ahead of a round: requests that sit out and have ended are closed, and those that the last step named give their pages back."""
    parked = list(runtime.queues.parked)
    release_finished(runtime)
    drop_aborted(runtime)
    retract_victims(runtime)
    if any(req.finished() or req not in runtime.queues.parked for req in parked):
        # SGLang looks at its queue again only once a running request has left; these were no part of the batch, and their rows are free.
        runtime.scheduler.running_batch.batch_is_full = False


def retract_victims(runtime: Runtime) -> None:
    """Sends the requests that the last step named back to the queue; they start over when their pages are there."""
    from sglang.srt.managers.schedule_batch import release_req

    scheduler = runtime.scheduler
    for request in runtime.participant.victims:
        req = next((r for r in runtime.queues.parked if r.dyncp is request and not r.finished()), None)
        if req is None:
            continue
        runtime.queues.parked.remove(req)
        req.dyncp_parked_row = None
        release_req(
            offload_kv=False,  # a decode server behind prefill servers would copy the pages to the host, of which it has some alone
            req=req,
            remaing_req_count=len(scheduler.running_batch.reqs),
            req_to_token_pool=scheduler.req_to_token_pool,
            token_to_kv_pool_allocator=scheduler.token_to_kv_pool_allocator,
            tree_cache=scheduler.tree_cache,
            hisparse_coordinator=None,
        )
        release_unwritten(runtime, req)
        req.dyncp = None
        place_again(runtime, req)
        start_over(scheduler, req)
    runtime.participant.victims = []


def start_over(scheduler: Any, req: Any) -> None:
    """Back to where its K/V is computed: the own queue, or the prefill server, which is asked once more. The last token that the client got
    is then taken for the one that the prefill server samples."""
    if not behind_prefill_servers(scheduler):
        scheduler._add_request_to_queue(req, is_retracted=True)
        return
    if req.output_ids:
        req.pd_rebootstrap_forced_output_id = req.output_ids.pop()
    req.pd_rebootstrap_in_progress = True
    req.extra_key = req.dyncp_extra_key  # the prefill server has a prefix cache, and shares it among the client's requests
    req.time_stats.set_retract_time()
    scheduler.disagg_decode_prealloc_queue.add(req, is_rebootstrap=True)


def release_unwritten(runtime: Runtime, req: Any) -> None:
    """Closes the books of a request that owns no written page: freeing its row does not pass the allocator.

    That is a local one which was taken over with all its tokens in prefix-cache pages and has not stored a token since.
    """
    if req.dyncp.handle in runtime.participant.homes.requests:
        end_request(runtime, req.dyncp)


def release_finished(runtime: Runtime) -> None:
    """Requests that finished while they sat out: by the result of the step before, or by an abort that SGLang carried out."""
    for req in runtime.queues.parked:
        if req.finished():
            req.dyncp_parked_row = None
            release_unwritten(runtime, req)


def place_again(runtime: Runtime, req: Any) -> None:
    """Where a retracted request starts over.

    A pinned one keeps home and shards, and gets more of them only where it has outgrown those (page_segments). Another one asks for one
    instance where one can hold it, and is granted that or waits (Room.split); else for as few as have room, which a grant may split
    otherwise.
    """
    participant, placement = runtime.participant, req.dyncp_placement
    limits, page_size, total = participant.limits, participant.page_size, len(req.origin_input_ids) + len(req.output_ids)
    fits_home = total + 2 * page_size <= participant.num_pages * page_size
    if (placement is None or placement.is_local) and fits_home:
        return
    pages = min(num_pages(total, page_size) + 1, limits.reach_pages)
    if placement is not None and not req.dyncp_placement_flexible:
        if not placement.is_local:
            return
        split = limits.complete(participant.rank, ((participant.rank, 1),), pages)
    else:
        room = [participant.num_pages - tokens // page_size for tokens in participant.kv_tokens]
        split = limits.whole(participant.rank, pages, room, at_home=fits_home) or limits.split(participant.rank, pages, room)
        split = split or limits.split(participant.rank, pages, [participant.num_pages] * len(room))
        req.dyncp_placement_flexible = True
    assert split is not None, f"{req.rid}: {pages} pages were held within {limits}"
    heads = [count * page_size for _, count in split[:-1]]
    # The tail may be there for the next token alone.
    req.dyncp_placement = Placement(participant.rank, tuple(rank for rank, _ in split), (*heads, max(0, total - sum(heads))))
    if not req.dyncp_placement.is_local:
        keep_out_of_prefix_cache(req)


@after
def inflight_batches(runtime: Runtime, result: list[Any], scheduler: Any) -> list[Any]:
    """AFTER Scheduler._collect_inflight_batches, which aborts and the running timeout go through: rows that sit out run too."""
    return result + [req.dyncp_parked_row for req in runtime.queues.parked]


@after
def count_parked(runtime: Runtime, result: Any, inquirer: Any) -> Any:
    """AFTER SchedulerLoadInquirer.get_loads: requests that sit out are running ones to everybody who asks."""
    result.num_running_reqs += len(runtime.queues.parked)
    return result


def drop_aborted(runtime: Runtime) -> None:
    """Ends those that SGLang marked, by an abort of the client or a timeout, with SGLang's reason."""
    from sglang.srt.managers.scheduler import _make_abort_req
    from sglang.srt.mem_cache.common import release_kv_cache

    scheduler = runtime.scheduler
    for req in [req for req in runtime.queues.parked if req.to_finish is not None and not req.finished()]:
        runtime.queues.parked.remove(req)
        req.dyncp_parked_row = None
        req.finished_reason = req.to_finish
        scheduler._release_aborted_request(req)
        release_kv_cache(req, scheduler.tree_cache, checkpoint=False)
        release_unwritten(runtime, req)
        scheduler.send_abort_output(_make_abort_req(req, finished_reason=req.finished_reason.to_json()), req)
