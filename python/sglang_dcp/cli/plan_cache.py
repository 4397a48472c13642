"""`sglang-dcp plan --trace ... --cache-fraction F`: what retained sequences would find of the prompts, and the prefill that this saves."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from sglang_dcp.conversations.from_trace import turns_of
from sglang_dcp.conversations.replay import WARM_UP_SHARE, make_cache, replay, summarise
from sglang_dcp.conversations.router import MAX_NEW_TOKENS
from sglang_dcp.policy.cost_model import CostModel
from sglang_dcp.traces.records import Trace, TraceRequest

COLUMNS = {"retained": "ours", "trees": "sticky", "one_pool": "pooled"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flag of this part."""
    parser.add_argument(
        "--cache-fraction",
        type=float,
        help="with --trace: as --dyncp-cache-fraction; tells what is found of the prompts (the trace must have ids of blocks: Mooncake)",
    )


def plan_cache(
    fraction: float, trace: Trace, requests: Sequence[TraceRequest], cost: CostModel, num_instances: int, pool: int, step_s: float
) -> dict[str, Any]:
    """Hit shares and seconds of prefill per request, of those behind the first 40 %: these fill the pools. step_s: per output token.

    ValueError for a fraction out of range, and for a trace that does not tell which prompts begin alike.
    """
    if not 0.0 < fraction <= 1.0:
        raise ValueError(f"--cache-fraction {fraction} is outside (0, 1]")
    if not trace.block_tokens:
        raise ValueError(f"--cache-fraction: {trace.name} ({trace.format}) does not tell which prompts begin alike; Mooncake's hash_ids do")
    turns = turns_of(requests, trace.block_tokens, step_s)
    fitting = [turn for turn in turns if turn.prompt_tokens + turn.output_tokens + MAX_NEW_TOKENS <= pool]
    if not fitting:
        raise ValueError(
            f"--cache-fraction: none of {len(turns)} requests fits a pool of {pool} tokens with {MAX_NEW_TOKENS} more (--pool-tokens)"
        )
    found = {
        name: summarise(replay(make_cache(column, cost, num_instances, pool, 1, cache_fraction=fraction), fitting), cost)
        for name, column in COLUMNS.items()
    }
    cold = summarise([(turn, 0, 0.0) for turn in fitting], cost)
    return {
        "fraction": fraction,
        "requests": len(fitting),
        "longer_than_a_pool": len(turns) - len(fitting),
        "hit_share": {name: row["hit_share"] for name, row in found.items()},
        "prefill_s_mean": {"none": cold["prefill_s_mean"]} | {name: row["prefill_s_mean"] for name, row in found.items()},
    }


def format_cache_plan(cache: dict[str, Any]) -> list[str]:
    """Lines of text."""
    hits, prefill = cache["hit_share"], cache["prefill_s_mean"]
    left_out = f", {cache['longer_than_a_pool']} longer than a pool left out" if cache["longer_than_a_pool"] else ""
    warm_up = f"the first {100 * WARM_UP_SHARE:.0f} % not counted"
    return [
        "",
        f"beginnings of prompts that were there before ({cache['requests']} requests, {warm_up}{left_out}), and prefill per request:",
        f"  no cache: {_line(0.0, prefill['none'])}",
        f"  --dyncp-cache-fraction {cache['fraction']:g}: {_line(hits['retained'], prefill['retained'])}",
        f"  a tree per instance, policy local: {_line(hits['trees'], prefill['trees'])}",
        f"  bound, one pool: {_line(hits['one_pool'], prefill['one_pool'])}",
    ]


def _line(hit_share: float, prefill_s: float) -> str:
    return f"{100 * hit_share:.1f} % found, {prefill_s:.2f} s"
