"""Hit share of recorded conversations on real servers with small pools, over who may keep what where.

    python -m benchmark.serving.conversations.run weka_claude_code_dev.parquet --out benchmark/results/conversations_served.json

Four servers of four instances, one after the other, each sent the same sessions in a closed loop: `stock` (SGLang with its own router and
trees), `off` (ours without retained sequences), `sticky` (ours, whole requests only: our router's map of prefixes, SGLang's trees), `on`.
The simulator then replays what `on` was sent, at the times at which it was sent them: its one pool is the bound.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmark.serving.conversations.closed_loop import ServedTurn, as_recorded, converse, hit_share
from benchmark.serving.conversations.misses import missed_shares
from benchmark.serving.conversations.sessions import PAGE_TOKENS, TOKENS_PER_SERVED, Session, choose_sessions
from benchmark.serving.provenance import ROOT, provenance
from sglang_dcp.conversations.replay import COLUMNS, make_cache, replay
from sglang_dcp.policy.cost_model import CostModel, load_cost_model
from testing.metrics import PREFIX, parse_metrics
from testing.server import ServerConfig, ServerPool, server_pool

INSTANCES = 4
KEEPS = ("--dyncp-cache-fraction", "1.0", "--dyncp-cache-min-tokens", str(PAGE_TOKENS))
SERVERS: dict[str, tuple[str, ...] | None] = {"stock": None, "off": (), "sticky": ("--dyncp-policy", "local", *KEEPS), "on": KEEPS}
"""Flags beside --enable-dyncp, None without it."""


def serve(
    pool: ServerPool, name: str, sessions: Sequence[Session], pool_tokens: int, at_once: int
) -> tuple[dict[str, Any], list[ServedTurn]]:
    """Has all sessions served by a server of this name."""
    flags = SERVERS[name]
    config = ServerConfig(
        "qwen3moe",
        INSTANCES,
        pool_tokens=pool_tokens,
        page_size=PAGE_TOKENS,
        chunk_tokens=256,
        dyncp=flags is not None,
        flags=("--enable-metrics", *(flags or ())),
    )
    server = pool.get(config)
    started = time.monotonic()
    served = converse(server.client, sessions, at_once)
    row: dict[str, Any] = {"hit_share": hit_share(served), "seconds": round(time.monotonic() - started, 1), "turns": len(served)}
    if flags is not None:
        row |= read_counters(server.client.metrics())
        row |= {"missed": missed_shares(sessions, served), "sharded": round(sum(len(t.shards) > 1 for t in served) / len(served), 3)}
    return row, served


def read_counters(text: str) -> dict[str, float]:
    """Hits and evictions by reason, of all instances."""
    totals: dict[str, float] = {}
    for sample in parse_metrics(text):
        name = sample.name.removeprefix(PREFIX)
        if name in ("prefix_hits_total", "evictions_total", "retractions_total"):
            key = "_".join([name.removesuffix("_total"), *filter(None, [sample.labels.get("reason")])])
            totals[key] = totals.get(key, 0) + sample.value
    return totals


def simulated_cost() -> CostModel:
    """The constants that a server of the tiny models takes, for the simulator's longer tokens."""
    cost = load_cost_model("cpu", INSTANCES)
    return replace(
        cost,
        attention_us_per_token=cost.attention_us_per_token / TOKENS_PER_SERVED,
        prefill_us_per_token=cost.prefill_us_per_token / TOKENS_PER_SERVED,
        prefill_attention_us_per_token_context=cost.prefill_attention_us_per_token_context / TOKENS_PER_SERVED**2,
    )


def simulate(sessions: Sequence[Session], served: Sequence[ServedTurn], pool_tokens: int, divide: int) -> dict[str, float]:
    """Hit shares of the simulator's columns for the same turns at the same times."""
    turns, cost = as_recorded(sessions, served), simulated_cost()
    shares = {}
    for column in COLUMNS:
        found = replay(make_cache(column, cost, INSTANCES, pool_tokens * TOKENS_PER_SERVED, 1, divide // TOKENS_PER_SERVED), turns)
        shares[column] = round(sum(cached for _, cached, _ in found) / sum(turn.prompt_tokens for turn in turns), 4)
    return shares


def measure(args: argparse.Namespace, pool_tokens: int, result: dict[str, Any], save: Callable[[], None]) -> None:
    """Adds to the result of one size of the pools, which may have other servers already. save: called behind every server."""
    sessions = choose_sessions(
        args.trace,
        divide=args.divide,
        pool_tokens=pool_tokens,
        count=args.sessions,
        num_turns=args.turns,
        hurry=args.hurry,
        seed=args.seed,
    )
    with server_pool(ROOT / "logs") as pool:
        for name in args.server or SERVERS:
            result["servers"][name], served = serve(pool, name, sessions, pool_tokens, args.at_once)
            print(pool_tokens, name, result["servers"][name], file=sys.stderr, flush=True)
            if name == "on":
                result["recorded"] = [f"{t.session} {t.index} {t.sent_s:.2f} {t.ended_s:.2f}" for t in served]
                result["simulated"] = simulate(sessions, served, pool_tokens, args.divide)
                print(result["simulated"], file=sys.stderr, flush=True)
            result |= bars(result)
            save()


def bars(result: dict[str, Any]) -> dict[str, float]:
    """What the figures are judged by, of the servers that were there."""
    shares = {name: row["hit_share"] for name, row in result["servers"].items()}
    found = {}
    if "on" in shares:
        found["hit_share_of_bound"] = round(shares["on"] / result["simulated"]["pooled"], 4)
    if {"on", "sticky"} <= set(shares):
        found["hit_share_over_sticky"] = round(shares["on"] / shares["sticky"], 4)
    return found


def _save(path: Path, result: dict[str, Any]) -> None:
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path, help="as of benchmark.simulate.conversations.run")
    parser.add_argument("--pool-tokens", type=int, action="append", help="KV tokens per instance; repeat for several (default 3072)")
    parser.add_argument("--server", action="append", choices=tuple(SERVERS), help="repeat for several (default: all); others stay in --out")
    parser.add_argument("--divide", type=int, default=128, help="lengths of the trace over those served")
    parser.add_argument("--hurry", type=float, default=6.0, help="users think so many times faster than in the trace")
    parser.add_argument("--sessions", type=int, default=36)
    parser.add_argument("--turns", type=int, default=12, help="per session")
    parser.add_argument("--at-once", type=int, default=24, help="sessions that are open at a time")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    settings = {key: getattr(args, key) for key in ("divide", "hurry", "sessions", "turns", "at_once", "seed")}
    earlier = json.loads(args.out.read_text()) if args.out.exists() else {}
    rows = earlier["rows"] if earlier.get("settings") == settings else []
    result = provenance(" ".join(["python -m benchmark.serving.conversations.run", args.trace.name, *sys.argv[2:]]))
    result |= {"instances": INSTANCES, "settings": settings, "rows": rows}
    for pool_tokens in args.pool_tokens or [3072]:
        row = next((each for each in rows if each["pool_tokens"] == pool_tokens), None)
        if row is None:
            rows.append(row := {"pool_tokens": pool_tokens, "servers": {}})
        measure(args, pool_tokens, row, functools.partial(_save, args.out, result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
