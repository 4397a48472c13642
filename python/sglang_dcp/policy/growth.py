"""The tail is full: which instance takes the next page, and who yields when none can."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sglang_dcp.policy.cost_model import CostModel


@dataclass(frozen=True, slots=True, order=True)
class RequestOrder:
    """The total order of requests that every instance computes alike: step of the first ask, then home, then a serial per home."""

    first_asked_step: int
    home: int
    serial: int = 0


def next_tail(
    home: int, shards: Sequence[int], room: Sequence[int], *, max_degree: int, levels: Sequence[float], nodes: Sequence[int]
) -> int | None:
    """Rank that takes the next tail page of a request, or None when nothing has room.

    The home first (then only queries and partial results travel), then the existing shard with most room, then a new shard of the
    lowest predicted level, in the home's node before any other, while the distinct shards stay within `max_degree`.
    room[r]: free pages of rank r. levels[r]: `predicted_level`. nodes[r]: the node of rank r.
    """
    held = set(shards)
    may_widen = len(held) < max_degree
    if room[home] > 0 and (home in held or may_widen):
        return home
    existing = [rank for rank in held if room[rank] > 0]
    if existing:
        return max(existing, key=lambda rank: (room[rank], -rank))
    fresh = [rank for rank in range(len(room)) if rank not in held and room[rank] > 0] if may_widen else []
    return min(fresh, key=lambda rank: (nodes[rank] != nodes[home], levels[rank], -room[rank], rank), default=None)


def predicted_level(cost_model: CostModel, kv_tokens: int, home_requests: int) -> float:
    """Attention time of an instance [us per layer], as far as its load tells."""
    return cost_model.attention_us_per_token * kv_tokens + cost_model.request_us * home_requests


def choose_victim(candidates: Iterable[RequestOrder]) -> RequestOrder | None:
    """The youngest of the requests that hold pages on the full shard, wherever its home is; None when there is none."""
    return max(candidates, default=None)
