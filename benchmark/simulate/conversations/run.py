"""Hit share and prefill work of recorded conversations, over the capacity of the pools.

    python -m benchmark.simulate.conversations.run weka_claude_code_dev.parquet --rate 1 --instances 8 --pool-tokens 1100000 --out FILE

Four columns: `stock` lands turns at random and keeps a tree per instance; `sticky` is the same behind our router's map of prefixes; `ours`
keeps sequences in the pools of all instances by the ledger's decisions, a later turn has to come to their home; `pooled` is the bound, one
pool of the same size in all. The trace does not say what an answer became in the next prompt, so prompts alone are kept. Pools' time is the
trace's: a turn holds its pages as long as it took there, hit or not.
"""

from __future__ import annotations

import argparse
import heapq
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from benchmark.serving.provenance import provenance
from benchmark.simulate.conversations.router import MAX_NEW_TOKENS, Router
from benchmark.simulate.conversations.sequences import RetainedSequences
from benchmark.simulate.conversations.tree import TreePerInstance
from benchmark.simulate.conversations.turns import BLOCK_TOKENS, Turn, arrivals, read_conversations
from sglang_dcp.policy.cost_model import CostModel, load_cost_model
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


def make_cache(column: str, cost: CostModel, num_instances: int, pool_tokens: int, seed: int, divide: int = 1) -> Cache:
    """Of one column, or `shared`: one pool whose sequences many read at once. divide: lengths of the turns were divided by it."""
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
    return RetainedSequences(router, limits)


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


def simulate(
    turns: Sequence[Turn], cost: CostModel, num_instances: int, pools: Sequence[int], columns: Sequence[str], seed: int, divide: int
) -> list[dict[str, Any]]:
    """A row per pool size and column."""
    rows = []
    for pool in pools:
        for column in columns:
            cache = make_cache(column, cost, num_instances, pool, seed, divide)
            rows.append({"pool_tokens": pool, "column": column, **summarise(replay(cache, turns), cost), **shares_beyond(cache, turns)})
            print(rows[-1], file=sys.stderr, flush=True)
    return rows


def shares_beyond(cache: Cache, turns: Sequence[Turn]) -> dict[str, float]:
    """RetainedSequences.tokens over all prompt tokens, the warm-up included."""
    total = sum(turn.prompt_tokens for turn in turns)
    found = cache.tokens if isinstance(cache, RetainedSequences) else {}
    return {f"{name}_share": round(tokens / total, 4) for name, tokens in found.items()}


def main(arguments: list[str] | None = None) -> int:
    """Writes the rows; returns 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m benchmark.simulate.conversations.run", description=__doc__)
    parser.add_argument("trace", type=Path, help="table with session, t_session_s, lengths and runs of block ids")
    parser.add_argument("--cost-model", default="deepseek-v3.h200")
    parser.add_argument("--instances", type=int, default=8)
    parser.add_argument("--pool-tokens", type=int, action="append", help="KV tokens per instance; repeat for several (default 1100000)")
    parser.add_argument("--column", action="append", choices=COLUMNS, help="repeat for several (default: all)")
    parser.add_argument("--rate", type=float, default=1.0, help="requests per second in the long run")
    parser.add_argument("--hours", type=float, default=5.0)
    parser.add_argument("--divide", type=int, default=1, help="divide all lengths")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(arguments)
    try:
        cost = load_cost_model(args.cost_model, args.instances)
        pools, columns = args.pool_tokens or [1_100_000], args.column or COLUMNS
        every = arrivals(read_conversations(args.trace, args.divide), args.rate, args.hours, args.seed)
        # What no pool holds whole only ours could serve: the same turns in all columns.
        turns = [turn for turn in every if turn.prompt_tokens + turn.output_tokens + MAX_NEW_TOKENS // args.divide <= min(pools)]
        if not turns:
            raise ValueError(f"none of {len(every)} turns fits a pool of {min(pools)} tokens (--pool-tokens, --divide)")
        rows = simulate(turns, cost, args.instances, pools, columns, args.seed, args.divide)
    except (OSError, ValueError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    flags = [f"--pool-tokens {pool}" for pool in pools] + [f"--divide {args.divide}"] * (args.divide > 1)
    place = f"--rate {args.rate:g} --hours {args.hours:g} --instances {args.instances} --seed {args.seed}"
    command = " ".join([parser.prog, args.trace.name, place, *flags])
    settings = {
        "cost_model": args.cost_model,
        "instances": args.instances,
        "rate": args.rate,
        "divide": args.divide,
        "num_turns": len(turns),
        "num_beyond_a_pool": len(every) - len(turns),
    }
    args.out.write_text(json.dumps(provenance(command) | settings | {"rows": rows}, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
