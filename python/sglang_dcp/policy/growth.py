"""The tail is full: which instance takes the next page, and who yields when none can."""

from __future__ import annotations

from collections.abc import Sequence

from sglang_dcp.policy.cost_model import CostModel
from sglang_dcp.policy.split_limits import SplitLimits

Order = tuple[int, int, int]
"""(step of the first ask, home, a serial per home): the total order of requests that every instance computes alike."""


def next_tail(
    home: int,
    shards: Sequence[int],
    num_pages: int,
    room: Sequence[int],
    *,
    limits: SplitLimits,
    guest_room: Sequence[int],
    levels: Sequence[float],
) -> int | None:
    """Rank that takes the next tail page of a request of `num_pages`, that page included, or None when nothing has room.

    The home first (then only queries and partial results travel), then the existing shard with most room, then a new shard of the
    lowest predicted level, within the degree and the home's scope.
    room[r]: free pages of rank r. guest_room[r]: pages that new guests may take there. levels[r]: `predicted_level`.
    """
    held = set(shards)
    may_widen = len(held) < limits.max_degree
    if room[home] > 0 and (home in held or may_widen):
        return home
    existing = [rank for rank in held if room[rank] > 0]
    if existing:
        return max(existing, key=lambda rank: (room[rank], -rank))
    if not may_widen:
        return None
    node_of, node = limits.layout.node_of, limits.layout.node_of(home)
    fresh = [rank for rank in limits.scope(home, num_pages) if room[rank] > 0 and guest_room[rank] > 0 and rank not in held]
    return min(fresh, key=lambda rank: (node_of(rank) != node, levels[rank], -room[rank], rank), default=None)


def may_grow_on(home: int, shards: Sequence[int], num_pages: int, limits: SplitLimits) -> Sequence[int]:
    """The ranks that `next_tail` may ever answer for these shards and pages."""
    held = set(shards)
    if len(held) >= limits.max_degree:
        return sorted(held)
    return sorted({home, *held, *(limits.scope(home, num_pages) if limits.guest_pages else ())})


def predicted_level(cost_model: CostModel, kv_tokens: int, home_requests: int) -> float:
    """Attention time of an instance [us per layer], as far as its load tells."""
    return cost_model.attention_us_per_token * kv_tokens + cost_model.request_us * home_requests


def choose_victim(stuck: Sequence[Order], *, somebody_gets_on: bool) -> Order | None:
    """Who of the requests without a page for their next token gives all pages back: the youngest, as soon as two are stuck or nobody else
    gets on. Among two, one must yield, or each may hold what the other needs."""
    return max(stuck) if len(stuck) > 1 or (stuck and not somebody_gets_on) else None
