"""Hit share and prefill work of recorded conversations, over the capacity of the pools.

    python -m benchmark.simulate.conversations.run weka_claude_code_dev.parquet --rate 1 --instances 8 --pool-tokens 1100000 --out FILE

Four columns: `stock` lands turns at random and keeps a tree per instance; `sticky` is the same behind our router's map of prefixes; `ours`
keeps sequences in the pools of all instances by the ledger's decisions, a later turn has to come to their home; `pooled` is the bound, one
pool of the same size in all. The trace does not say what an answer became in the next prompt, so prompts alone are kept. Pools' time is the
trace's: a turn holds its pages as long as it took there, hit or not.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmark.serving.provenance import provenance
from benchmark.simulate.conversations.turns import arrivals, read_conversations
from sglang_dcp.conversations.replay import COLUMNS, make_cache, replay, shares_beyond, summarise
from sglang_dcp.conversations.router import MAX_NEW_TOKENS
from sglang_dcp.conversations.turns import Turn
from sglang_dcp.policy.cost_model import CostModel, load_cost_model


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
