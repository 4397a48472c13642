"""`sglang-dcp plan`: where one request would go against a given load, and what the step would cost before and after."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from sglang_dcp.policy.cost_model import CostModel, InstanceWork, load_cost_model
from sglang_dcp.policy.expected_output import EXPECTED_NEW_TOKENS, expected_new_tokens
from sglang_dcp.policy.placement import make_policy
from sglang_dcp.policy.types import InstanceLoad, Placement, PlacementRequest

LOAD_HELP = (
    'JSON: {"instances": [{"kv_tokens": 90000, "home_requests": 12, "kv_capacity": 1000000, "guest_tokens": 0, "node": 0}, ...]}; '
    "kv_capacity defaults to --pool-tokens or the cost model's pool, node to 8 instances each"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the command."""
    parser.add_argument("--load", type=Path, required=True, help=LOAD_HELP)
    parser.add_argument("--prompt", type=int, required=True, help="prompt tokens of the request")
    expected = f"output tokens to expect (default: as a server does, at most {EXPECTED_NEW_TOKENS} where a request may grow elsewhere)"
    parser.add_argument("--expected-new", type=int, help=expected)
    parser.add_argument("--max-new", type=int, default=4096, help="max_new_tokens of the request (default 4096)")
    parser.add_argument("--degree", type=int, help="pin the degree")
    parser.add_argument("--home", type=int, help="pin the home")
    parser.add_argument("--cost-model", default="deepseek-v3.h200", help="name or JSON file (default deepseek-v3.h200)")
    parser.add_argument("--policy", default="dual-balance", help="as --dyncp-policy, or local-least-batch, local-least-kv")
    parser.add_argument("--policy-degree", type=int, help="as --dyncp-degree, with --policy fixed")
    parser.add_argument("--page-size", type=int, default=64)
    parser.add_argument("--pool-tokens", type=int, help="KV tokens per instance where the load names none")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def run(args: argparse.Namespace) -> int:
    """Prints the plan; returns 2 for bad input or a request that cannot be placed."""
    try:
        plan = make_plan(args)
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"sglang-dcp plan: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(plan))
        return 0
    shards = ", ".join(f"{rank}: {tokens}" for rank, tokens in zip(plan["shards"], plan["shard_tokens"], strict=True))
    note = "" if plan["fits_now"] else " (has to wait for room)"
    print(f"home {plan['home']}, degree {plan['degree']}, tokens per shard {{{shards}}}{note}")
    print(f"expects {plan['expected_new_tokens']} of at most {args.max_new} new tokens")
    print(f"step {plan['step_ms_before']:.2f} ms -> {plan['step_ms_after']:.2f} ms ({plan['policy']}, {plan['cost_model']})")
    return 0


def make_plan(args: argparse.Namespace) -> dict[str, Any]:
    """The plan as JSON values. Raises ValueError naming what is wrong with the load or the request."""
    data = json.loads(args.load.read_text(encoding="utf-8"))
    instances = data["instances"]
    if not instances:
        raise ValueError(f"{args.load}: instances is empty")
    cost = load_cost_model(args.cost_model, len(instances))
    loads = [_load(rank, item, args.pool_tokens or cost.pool_tokens, cost.gpus_per_node) for rank, item in enumerate(instances)]
    policy = make_policy(
        args.policy,
        num_instances=len(loads),
        page_size=args.page_size,
        cost_model=cost,
        degree=args.policy_degree,
        max_degree=len(loads),
        max_guest_fraction=1.0,
    )
    largest_degree = 1 if args.policy.startswith("local") else args.policy_degree or len(loads)
    expected = expected_new_tokens(args.max_new, largest_degree) if args.expected_new is None else args.expected_new
    request = PlacementRequest(args.prompt, expected, args.max_new, args.degree, args.home)
    placement = policy.place(request, loads, args.page_size)
    needed = {rank: -(-tokens // args.page_size) for rank, tokens in zip(placement.shards, placement.shard_tokens, strict=True)}
    return {
        "policy": policy.name,
        "cost_model": cost.name,
        "home": placement.home,
        "degree": placement.degree,
        "shards": list(placement.shards),
        "shard_tokens": list(placement.shard_tokens),
        "expected_new_tokens": expected,
        "fits_now": all(pages * args.page_size <= loads[rank].free_tokens for rank, pages in needed.items()),
        "step_ms_before": step_ms(cost, loads, None),
        "step_ms_after": step_ms(cost, loads, placement),
    }


def _load(rank: int, item: dict[str, int], pool_tokens: int | None, per_node: int) -> InstanceLoad:
    known = {"kv_tokens", "home_requests", "kv_capacity", "guest_tokens", "node"}
    if not set(item) <= known:
        raise ValueError(f"instance {rank}: unknown keys {sorted(set(item) - known)}, expected {sorted(known)}")
    capacity = item.get("kv_capacity", pool_tokens)
    if not capacity:
        raise ValueError(f"instance {rank}: no kv_capacity, and neither --pool-tokens nor the cost model gives one")
    return InstanceLoad(
        rank=rank,
        node=item.get("node", rank // per_node),
        kv_tokens=item["kv_tokens"],
        kv_capacity=capacity,
        guest_tokens=item.get("guest_tokens", 0),
        home_requests=item["home_requests"],
        attention_rows=item["home_requests"],
    )


def step_ms(cost: CostModel, loads: list[InstanceLoad], placement: Placement | None) -> float:
    """Predicted step with the placement added. An instance with guest tokens counts one routed row in: the load does not tell how many."""
    work = []
    for load in loads:
        held = routed_in = routed_out = 0
        if placement is not None:
            held = dict(zip(placement.shards, placement.shard_tokens, strict=True)).get(load.rank, 0)
            routed_in = int(held > 0 and load.rank != placement.home)
            routed_out = sum(shard != load.rank for shard in placement.shards) if load.rank == placement.home else 0
        is_home = placement is not None and load.rank == placement.home
        work.append(
            InstanceWork(
                kv_tokens=load.kv_tokens + held,
                attention_rows=load.attention_rows + int(held > 0),
                home_requests=load.home_requests + int(is_home),
                routed_out=routed_out,
                routed_in=routed_in + int(load.guest_tokens > 0),
            )
        )
    return cost.step_us(work) / 1000
