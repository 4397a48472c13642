"""Hit share of recorded conversations on real servers with small pools, over who may keep what where.

    python -m benchmark.serving.conversations.run weka_claude_code_dev.parquet --out benchmark/results/conversations_served.json

Four servers of four instances, one after the other. `on`, ours with retained sequences, is sent its turns in a closed loop; the others are
sent the same turns at the same times, or as soon as a session's last answer is there: `off` (ours, nothing retained), `stock` (SGLang, each
turn where its own balancing sends it), `sticky` (SGLang, the client names one instance for all turns of a session). The simulator replays
what `on` was sent, at these times: its one pool is the bound. Turns that no pool of `--fits` tokens holds whole, which stock would refuse,
are in none of them. `--server` runs some of them; the others stay in --out.
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

from benchmark.serving.conversations.closed_loop import ServedTurn, as_recorded, converse, hit_share, ttft_median_s
from benchmark.serving.conversations.misses import missed_shares
from benchmark.serving.conversations.repeated import StickyHomes, Times, converse_again, mean_lateness_s
from benchmark.serving.conversations.sessions import PAGE_TOKENS, TOKENS_PER_SERVED, Session, choose_sessions
from benchmark.serving.provenance import ROOT, provenance
from sglang_dcp.conversations.replay import COLUMNS, make_cache, replay
from sglang_dcp.policy.cost_model import CostModel, load_cost_model
from testing.metrics import PREFIX, parse_metrics
from testing.server import ServerConfig, ServerPool, server_pool

INSTANCES = 4
KEEPS = ("--dyncp-cache-fraction", "1.0", "--dyncp-cache-min-tokens", str(PAGE_TOKENS))
SERVERS: dict[str, tuple[str, ...] | None] = {"on": KEEPS, "off": ("--dyncp-cache-fraction", "0"), "stock": None, "sticky": None}
"""Flags beside --enable-dyncp, None without it."""
SETTINGS = ("fits", "divide", "hurry", "sessions", "turns", "at_once", "seed")
"""Rows of a file belong to one set of them."""


def serve(
    pool: ServerPool, name: str, sessions: Sequence[Session], pool_tokens: int, at_once: int, times: Times | None
) -> tuple[dict[str, Any], list[ServedTurn]]:
    """Has all sessions served by a server of this name. times: those of `on`, None for itself."""
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
    if times is None:
        served = converse(server.client, sessions, at_once)
    else:
        homes = StickyHomes(INSTANCES) if name == "sticky" else None
        served = converse_again(server.client, sessions, times, homes)
    row: dict[str, Any] = {"commit": provenance("")["commit"], "hit_share": hit_share(served), "turns": len(served)}
    row |= {"seconds": round(time.monotonic() - started, 1), "ttft_median_s": ttft_median_s(served)}
    if times is not None:
        row["late_s_mean"] = mean_lateness_s(served, times)
    if flags is not None:
        row |= read_counters(server.client.metrics())
        row["sharded"] = round(sum(len(t.shards) > 1 for t in served) / len(served), 3)
    if all(turn.home is not None for turn in served):
        row["missed"] = missed_shares(sessions, served)
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


def measure(args: argparse.Namespace, pool: ServerPool, pool_tokens: int, result: dict[str, Any], save: Callable[[], None]) -> None:
    """Adds to the result of one size of the pools, which may have other servers already. save: called behind every server."""
    sessions = choose_sessions(
        args.trace,
        divide=args.divide,
        pool_tokens=args.fits,
        count=args.sessions,
        num_turns=args.turns,
        hurry=args.hurry,
        seed=args.seed,
    )
    for name in args.server or SERVERS:
        times = None if name == "on" else recorded_times(result, pool_tokens)
        row, served = serve(pool, name, sessions, pool_tokens, args.at_once, times)
        print(pool_tokens, name, row, file=sys.stderr, flush=True)
        if name == "on":  # new times: what others were sent at the old ones goes
            result["servers"] = {}
            result["recorded"] = [f"{t.session} {t.index} {t.sent_s:.2f} {t.ended_s:.2f}" for t in served]
            result["simulated"] = simulate(sessions, served, pool_tokens, args.divide)
            print(result["simulated"], file=sys.stderr, flush=True)
        result["servers"][name] = row
        result |= bars(result)
        save()


def recorded_times(result: dict[str, Any], pool_tokens: int) -> Times:
    """When `on` was sent its turns."""
    if "recorded" not in result:
        raise ValueError(f"nothing was sent yet at --pool-tokens {pool_tokens}: the others repeat what `--server on` was sent")
    lines = (line.split() for line in result["recorded"])
    return {(int(session), int(index)): float(sent_s) for session, index, sent_s, _ in lines}


def bars(result: dict[str, Any]) -> dict[str, float]:
    """What the figures are judged by, of the servers that were there."""
    shares = {name: row["hit_share"] for name, row in result["servers"].items()}
    found = {}
    if "on" in shares:
        found["hit_share_of_bound"] = round(shares["on"] / result["simulated"]["pooled"], 4)
    if {"on", "sticky"} <= set(shares):
        found["hit_share_over_sticky"] = round(shares["on"] / shares["sticky"], 4)
    return found


def stored(path: Path, trace: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """What there is already of these settings, with this run's commit: every server's row has its own."""
    flags = [f"--{name.replace('_', '-')} {value}" for name, value in settings.items()]
    result = provenance(" ".join(["python -m benchmark.serving.conversations.run", trace.name, *flags]))
    earlier = json.loads(path.read_text()) if path.exists() else {}
    rows = earlier["rows"] if earlier.get("settings") == settings else []
    return result | {"instances": INSTANCES, "settings": settings, "rows": rows}


def _save(path: Path, result: dict[str, Any]) -> None:
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path, help="as of benchmark.simulate.conversations.run")
    parser.add_argument("--pool-tokens", type=int, action="append", help="KV tokens per instance; repeat for several (default 3072)")
    parser.add_argument("--server", action="append", choices=tuple(SERVERS), help="repeat for several (default: all); others stay in --out")
    parser.add_argument("--fits", type=int, default=3072, help="KV tokens of a pool that holds every turn whole; longer ones are left out")
    parser.add_argument("--divide", type=int, default=128, help="lengths of the trace over those served")
    parser.add_argument("--hurry", type=float, default=6.0, help="users think so many times faster than in the trace")
    parser.add_argument("--sessions", type=int, default=36)
    parser.add_argument("--turns", type=int, default=12, help="per session")
    parser.add_argument("--at-once", type=int, default=24, help="sessions that are open at a time")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    wanted = args.pool_tokens or [3072]
    if args.fits > min(wanted):
        parser.error(f"--fits {args.fits} exceeds --pool-tokens {min(wanted)}: some turns would fit no pool")
    # What is there is read once the machine is ours: another run may add to it until then.
    with server_pool(ROOT / "logs") as pool:
        result = stored(args.out, args.trace, {key: getattr(args, key) for key in SETTINGS})
        for pool_tokens in wanted:
            row = next((each for each in result["rows"] if each["pool_tokens"] == pool_tokens), None)
            if row is None:
                result["rows"].append(row := {"pool_tokens": pool_tokens, "servers": {}})
            measure(args, pool, pool_tokens, row, functools.partial(_save, args.out, result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
