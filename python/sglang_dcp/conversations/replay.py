"""Hit share and prefill work of turns that come and go, under one of four caches.

`stock` lands turns at random and keeps a tree per instance; `sticky` is the same behind our router's map of prefixes; `ours` keeps
sequences in the pools of all instances by the ledger's decisions, a later turn has to come to their home; `pooled` is the bound, one pool
of the same size in all.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from sglang_dcp.conversations.router import Router
from sglang_dcp.conversations.sequences import RetainedSequences
from sglang_dcp.conversations.tree import TreePerInstance
from sglang_dcp.conversations.turns import BLOCK_TOKENS, Turn
from sglang_dcp.policy.cost_model import CostModel
from sglang_dcp.policy.placement import make_policy
from sglang_dcp.policy.prefix_map import prefill_us
from sglang_dcp.policy.split_limits import Layout, SplitRule

COLUMNS = ("stock", "sticky", "ours", "pooled")
WARM_UP_SHARE = 0.4
"""Turns of the first part fill the pools; they are not counted."""


class Cache(Protocol):
    def arrive(self, turn: Turn) -> None: ...

    def begin(self) -> list[tuple[Turn, int]]:
        """(turn, cached tokens) of those that begin now."""
        ...

    def finish(self, turn: Turn) -> None: ...


def make_cache(
    column: str, cost: CostModel, num_instances: int, pool_tokens: int, seed: int, divide: int = 1, cache_fraction: float = 1.0
) -> Cache:
    """Of one column, or `shared`: one pool whose sequences many read at once. divide: lengths of the turns were divided by it.

    cache_fraction: of a pool, for retained sequences (--dyncp-cache-fraction); trees take what is free.
    """
    if column in ("pooled", "shared"):
        num_instances, pool_tokens = 1, num_instances * pool_tokens
    name = "dual-balance" if column == "ours" else "local"
    policy = make_policy(
        name,
        num_instances=num_instances,
        page_size=BLOCK_TOKENS,
        cost_model=cost,
        degree=None,
        max_degree=num_instances,
        max_guest_fraction=1.0,
    )
    chosen = None if column == "stock" else policy
    router = Router(chosen, cost, num_instances, pool_tokens, seed=seed, divide=divide, spreads=column == "sticky")
    if column in ("stock", "sticky", "shared"):
        return TreePerInstance(router, num_instances, pool_tokens)
    limits = SplitRule(num_instances).limits(pool_tokens // BLOCK_TOKENS, Layout(num_instances, cost.gpus_per_node, crosses=True))
    return RetainedSequences(router, limits, cache_fraction)


def replay(cache: Cache, turns: Sequence[Turn]) -> list[tuple[Turn, int, float]]:
    """(turn, cached tokens, seconds that it waited for room), in order of arrival. Raises RuntimeError for a turn that never begins."""
    ends: list[tuple[float, int, Turn]] = []
    served: dict[int, tuple[Turn, int, float]] = {}
    pending = list(reversed(turns))
    while pending or ends:
        if ends and (not pending or ends[0][0] <= pending[-1].arrival_s):
            now, _, turn = heapq.heappop(ends)
            cache.finish(turn)
        else:
            now = pending[-1].arrival_s
            cache.arrive(pending.pop())
        for turn, cached in cache.begin():
            served[id(turn)] = turn, cached, now - turn.arrival_s
            heapq.heappush(ends, (now + turn.service_s, len(served), turn))
    if len(served) < len(turns):
        raise RuntimeError(f"{len(turns) - len(served)} of {len(turns)} turns never found room")
    return [served[id(turn)] for turn in turns]


def summarise(served: Sequence[tuple[Turn, int, float]], cost: CostModel) -> dict[str, float]:
    """Of the turns behind the warm-up. prefill_s: seconds of one instance per turn; ttft_s: these and the wait."""
    measured = served[int(WARM_UP_SHARE * len(served)) :]
    prefill = np.array([prefill_us(cost, cached, turn.prompt_tokens) for turn, cached, _ in measured]) / 1e6
    waits = np.array([wait for _, _, wait in measured])
    ttft = np.percentile(prefill + waits, (50, 90))
    return {
        "hit_share": round(sum(cached for _, cached, _ in measured) / sum(turn.prompt_tokens for turn, _, _ in measured), 4),
        "prefill_s_mean": round(float(prefill.mean()), 3),
        "wait_s_mean": round(float(waits.mean()), 3),
        "ttft_s_p50": round(float(ttft[0]), 3),
        "ttft_s_p90": round(float(ttft[1]), 3),
    }


def shares_beyond(cache: Cache, turns: Sequence[Turn]) -> dict[str, float]:
    """RetainedSequences.tokens over all prompt tokens, the warm-up included."""
    total = sum(turn.prompt_tokens for turn in turns)
    found = cache.tokens if isinstance(cache, RetainedSequences) else {}
    return {f"{name}_share": round(tokens / total, 4) for name, tokens in found.items()}
