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
from sglang_dcp.upstream.step.binding import Binding, current
from sglang_dcp.upstream.step.instance import is_managed


class ReportedLoad(LoadSnapshot):
    """SGLang's snapshot and, of an instance that is attached, our report."""

    dyncp: HomeReport | None = None


def read_reports() -> None:
    """This process reads snapshots with their report."""
    load_snapshot.snapshot_decoder = msgspec.msgpack.Decoder(ReportedLoad)


def add_report(result: Any, inquirer: Any) -> Any:
    """AFTER SchedulerLoadInquirer.get_loads."""
    binding = current()
    if binding is None:
        return result
    fields = {name: getattr(result, name) for name in result.__struct_fields__}
    return ReportedLoad(**fields, dyncp=build_report(binding, int(result.num_used_tokens)))


def build_report(binding: Binding, used_tokens: int) -> HomeReport:
    """used_tokens: of the own pool, guests included.

    A managed request counts where its pages are from the moment of the grant, when its shards take them; until then, as every request that
    waits, where its placement puts it. Both change in one step of this scheduler, so no token is in the report twice or missing.
    """
    instance, scheduler = binding.instance, binding.scheduler
    granted = instance.homes.granted_pages.items()
    tokens = {owner: pages * instance.page_size for owner, pages in granted if owner != instance.rank and pages}
    tokens[instance.rank] = used_tokens - instance.guests.num_pages * instance.page_size
    queued = [*scheduler.waiting_queue, *scheduler.grammar_manager.grammar_queue]
    for req in queued:
        if is_managed(req) and req.dyncp.admitted:
            continue
        placement = req.dyncp_placement
        if placement is None or placement.is_local:
            tokens[instance.rank] += req.seqlen
            continue
        for shard, count in zip(placement.shards, placement.shard_tokens, strict=True):
            tokens[shard] = tokens.get(shard, 0) + count
    chunked = scheduler.chunked_req
    if chunked is not None and not is_managed(chunked):
        tokens[instance.rank] += max(0, chunked.seqlen - chunked.kv.kv_allocated_len)
    rows = scheduler.req_to_token_pool
    num_requests = len(queued) + rows.size - rows.available_size()
    return HomeReport(binding.placements_taken_in, num_requests, tokens)
