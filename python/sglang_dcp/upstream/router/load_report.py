"""An instance's report on its way to the router: one more field of SGLang's load snapshot.

The snapshot is msgpack with named fields, so readers that do not know the field (`/v1/loads`) pass over it. It is written into shared
memory by every scheduler, over ZeroMQ where there are several hosts; the process that receives those decodes and encodes again, so the
wider type is every process's.
"""

from __future__ import annotations

from typing import Any

import msgspec
import sglang.srt.managers.load_snapshot as load_snapshot
from sglang.srt.managers.load_snapshot import LoadSnapshot

from sglang_dcp.policy.cluster_view import HomeReport
from sglang_dcp.upstream.step.attached import after
from sglang_dcp.upstream.step.managed import is_managed
from sglang_dcp.upstream.step.queued import num_rows_in_use, without_pages
from sglang_dcp.upstream.step.runtime import Runtime


class ReportedLoad(LoadSnapshot):
    """SGLang's snapshot and, of an instance that is attached, our report, its step, and what ended it (upstream/ending). dyncp_lost_peer:
    that was the end of another instance. dyncp_slice: which one says so, where it has several."""

    dyncp: HomeReport | None = None
    dyncp_step: int = 0
    dyncp_slice: int | None = None
    dyncp_failure: str = ""
    dyncp_lost_peer: bool = False


def read_reports() -> None:
    """This process reads snapshots with their report."""
    load_snapshot.snapshot_decoder = msgspec.msgpack.Decoder(ReportedLoad)


@after
def add_report(runtime: Runtime, result: Any, inquirer: Any) -> Any:
    """AFTER SchedulerLoadInquirer.get_loads."""
    result.num_used_tokens -= runtime.participant.retention.num_pages_here * runtime.participant.page_size
    fields = {name: getattr(result, name) for name in result.__struct_fields__}
    return ReportedLoad(**fields, dyncp=build_report(runtime, int(result.num_used_tokens)), dyncp_step=runtime.participant.step)


def build_report(runtime: Runtime, used_tokens: int) -> HomeReport:
    """used_tokens: of the own pool, guests included, retained sequences not: they give way.

    A managed request counts where its pages are from the moment of the grant, when its shards take them; borrowed pages once per reader.
    Until then, as every request that waits, it counts where its placement puts it. Both change in one step of this scheduler, so no token
    is in the report twice or missing.
    """
    participant, scheduler = runtime.participant, runtime.scheduler
    granted = participant.homes.granted_pages.items()
    tokens = {owner: pages * participant.page_size for owner, pages in granted if owner != participant.rank and pages}
    guests = participant.guests.num_pages - participant.guests.num_retained
    tokens[participant.rank] = used_tokens - (guests - participant.homes.borrowed_here) * participant.page_size
    queued = [*without_pages(scheduler), *scheduler.grammar_manager.grammar_queue]
    for req in queued:
        if is_managed(req) and req.dyncp.admitted:
            continue
        placement = req.dyncp_placement
        if placement is None or placement.is_local:
            tokens[participant.rank] += req.seqlen
            continue
        for shard, count in zip(placement.shards, placement.shard_tokens, strict=True):
            tokens[shard] = tokens.get(shard, 0) + count
    chunked = scheduler.chunked_req
    if chunked is not None and not is_managed(chunked):
        tokens[participant.rank] += max(0, chunked.seqlen - chunked.kv.kv_allocated_len)
    num_requests = len(queued) + num_rows_in_use(scheduler.req_to_token_pool)
    return HomeReport(runtime.queues.placements_taken_in, num_requests, tokens)
