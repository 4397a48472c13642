"""The tail is full: which instance takes the next page, and who yields when none can."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sglang_dcp.policy.cost_model import CostModel
from sglang_dcp.policy.types import InstanceLoad


@dataclass(frozen=True, slots=True, order=True)
class RequestOrder:
    """The total order of requests that every instance computes alike: step of the first ask, then home, then a serial per home."""

    first_asked_step: int
    home: int
    serial: int = 0


def next_tail(
    home: int,
    shards: Sequence[int],
    loads: Sequence[InstanceLoad],
    page_size: int,
    cost_model: CostModel,
    *,
    max_degree: int,
) -> int | None:
    """Rank that takes the next tail page of a request, or None when nothing has room.

    The home first (then only queries and partial results travel), then the existing shard with most room, then a new shard of the
    lowest predicted level, in the home's node before any other, while the degree stays within `max_degree`. `loads[i].rank == i`.
    """
    if loads[home].free_tokens >= page_size and (home in shards or len(shards) < max_degree):
        return home
    existing = [rank for rank in shards if loads[rank].free_tokens >= page_size]
    if existing:
        return max(existing, key=lambda rank: (loads[rank].free_tokens, -rank))
    if len(shards) >= max_degree:
        return None
    fresh = [load for load in loads if load.rank not in shards and load.free_tokens >= page_size]
    if not fresh:
        return None
    node = loads[home].node

    def price(load: InstanceLoad) -> tuple[bool, float, int, int]:
        level = cost_model.attention_us_per_token * load.kv_tokens + cost_model.request_us * load.home_requests
        return load.node != node, level, -load.free_tokens, load.rank

    return min(fresh, key=price).rank


def choose_victim(candidates: Iterable[RequestOrder]) -> RequestOrder | None:
    """The youngest of the requests that hold pages on the full shard, wherever its home is; None when there is none."""
    return max(candidates, default=None)
