"""Who gets the next page in a simulation: the served rules (policy/growth.py) on the simulated books, and stock's where nothing grows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from benchmark.simulate.cluster import Cluster, SimulatedRequest
from sglang_dcp.policy.cost_model import CostModel
from sglang_dcp.policy.growth import Order, may_grow_on, next_tail, predicted_level
from sglang_dcp.policy.split_limits import SplitLimits


def order_of(request: SimulatedRequest) -> Order:
    """Requests are numbered as they arrive."""
    return request.identity, request.home, 0


def tail_with_room(cluster: Cluster, request: SimulatedRequest, limits: SplitLimits, cost: CostModel, *, grows: bool) -> int | None:
    """Rank of the next tail page, None when nothing has room. grows False: on the tail or nowhere."""
    free, size = cluster.free_pages, cluster.page_size
    if not grows:
        return request.tail if free[request.tail] > 0 else None
    levels = [predicted_level(cost, load.kv_capacity - free[load.rank] * size, load.home_requests) for load in cluster.loads]
    pages, shards = sum(request.pages.values()) + 1, tuple(request.pages)
    return next_tail(request.home, shards, pages, free, limits=limits, guest_room=cluster.guest_room, levels=levels)


def promised_to_growth(stalled: Iterable[SimulatedRequest], limits: SplitLimits) -> list[int]:
    """Pages that new requests leave to those that have stalled, per instance."""
    promised = [0] * limits.layout.num_instances
    for request in stalled:
        for rank in may_grow_on(request.home, tuple(request.pages), sum(request.pages.values()) + 1, limits):
            promised[rank] += 1
    return promised


def youngest_on(cluster: Cluster, rank: int, asking: SimulatedRequest, stalled: Sequence[SimulatedRequest]) -> SimulatedRequest:
    """Stock's victim, where nothing grows: the youngest on `rank` that decodes or has stalled (one in prefill keeps its pages)."""
    able = [other for other in cluster.residents[rank].values() if other.finish_step >= 0 or other is asking or other in stalled]
    return max(able, key=order_of, default=asking)
