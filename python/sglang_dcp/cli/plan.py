"""`sglang-dcp plan`: where one request would go against a given load and what a step costs at every degree, or what a trace would need."""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from sglang_dcp.cli import plan_trace
from sglang_dcp.cli.values import at_least
from sglang_dcp.observe.tables import align
from sglang_dcp.policy.attention_table import BFLOAT16, KV_DTYPES
from sglang_dcp.policy.cost_model import CostModel, InstanceWork
from sglang_dcp.policy.expected_output import EXPECTED_NEW_TOKENS, expected_new_tokens
from sglang_dcp.policy.placement import LOCAL_VARIANTS, POLICY_NAMES, make_policy
from sglang_dcp.policy.served_model import serving_cost
from sglang_dcp.policy.types import CapacityError, InstanceLoad, Placement, PlacementPolicy, PlacementRequest
from sglang_dcp.traces.flags import add_trace_flags

LOAD_HELP = (
    'JSON: {"instances": [{"kv_tokens": 90000, "home_requests": 12, "kv_capacity": 1000000, "guest_tokens": 0, "node": 0}, ...]}; '
    "kv_capacity defaults to --pool-tokens or the cost model's pool, node to 8 instances each"
)
LOAD_LEAST = {"kv_tokens": 0, "home_requests": 0, "kv_capacity": 1, "guest_tokens": 0, "node": 0}
LOAD_NEEDED = {"kv_tokens", "home_requests"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the command."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--load", type=Path, help=LOAD_HELP)
    add_trace_flags(parser, source)
    plan_trace.add_arguments(parser)
    parser.add_argument("--prompt", type=int, help="with --load: prompt tokens of the request")
    as_a_server = f"(default: as a server does, at most {EXPECTED_NEW_TOKENS} where a request may grow elsewhere)"
    parser.add_argument("--expected-new", type=at_least(0), help=f"with --load: output tokens to expect {as_a_server}")
    parser.add_argument("--max-new", type=at_least(0), default=4096, help="max_new_tokens of the request (default 4096)")
    parser.add_argument("--degree", type=int, help="with --load: pin the degree")
    parser.add_argument("--home", type=int, help="with --load: pin the home")
    parser.add_argument("--cost-model", default="deepseek-v3.h200", help="name or JSON file (default deepseek-v3.h200)")
    parser.add_argument("--kv-dtype", choices=list(KV_DTYPES), default=BFLOAT16, help="as --kv-cache-dtype: sizes pools and attention")
    policies = [*POLICY_NAMES, *LOCAL_VARIANTS]
    parser.add_argument("--policy", default="dual-balance", choices=policies, help="as --dyncp-policy, or a variant of local")
    parser.add_argument("--policy-degree", type=int, help="as --dyncp-degree, with --policy fixed")
    parser.add_argument("--page-size", type=int, default=64)
    parser.add_argument("--pool-tokens", type=at_least(1), help="KV tokens per instance where the load names none")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def run(args: argparse.Namespace) -> int:
    """Prints the plan; returns 2 for bad input or a request that cannot be placed."""
    try:
        plan_trace.refuse_unread(args)
        plan = plan_trace.make_trace_plan(args) if args.trace else make_plan(args)
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"sglang-dcp plan: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(plan))
        return 0
    print(plan_trace.format_trace_plan(plan) if args.trace else _format(plan, args.max_new))
    return 0


def _format(plan: dict[str, Any], max_new: int) -> str:
    shards = ", ".join(f"{rank}: {tokens}" for rank, tokens in zip(plan["shards"], plan["shard_tokens"], strict=True))
    note = "" if plan["fits_now"] else " (has to wait for room)"
    rows = [["degree", "home", "step", "", "room"]]
    for row in plan["prices"]:
        if "refused" in row:
            rows.append([str(row["degree"]), "-", "-", "", row["refused"]])
            continue
        chosen = "<- chosen" if row["degree"] == plan["degree"] else ""
        rows.append([str(row["degree"]), str(row["home"]), f"{row['step_ms']:.2f} ms", chosen, "now" if row["fits_now"] else "waits"])
    return "\n".join(
        [
            f"home {plan['home']}, degree {plan['degree']}, tokens per shard {{{shards}}}{note}",
            f"expects {plan['expected_new_tokens']} of at most {max_new} new tokens",
            *(f"warning: {text}" for text in plan["warnings"]),
            f"step {plan['step_ms_before']:.2f} ms -> {plan['step_ms_after']:.2f} ms ({plan['policy']}, {plan['cost_model']})",
            "",
            align(rows),
        ]
    )


def make_plan(args: argparse.Namespace) -> dict[str, Any]:
    """The plan as JSON values. Raises ValueError naming what is wrong with the load or the request."""
    if args.prompt is None:
        raise ValueError("--load needs --prompt, the tokens of the request")
    instances = _read_instances(args.load)
    served = serving_cost(args.cost_model, len(instances), args.kv_dtype)
    cost = served.model
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
    return {
        "policy": policy.name,
        "cost_model": served.description,
        "warnings": list(served.warnings),
        "home": placement.home,
        "degree": placement.degree,
        "shards": list(placement.shards),
        "shard_tokens": list(placement.shard_tokens),
        "expected_new_tokens": expected,
        "fits_now": _fits_now(placement, loads, args.page_size),
        "step_ms_before": step_ms(cost, loads, None),
        "step_ms_after": step_ms(cost, loads, placement),
        "prices": _prices(cost, policy, request, loads, placement, largest_degree, args.page_size),
    }


def _prices(
    cost: CostModel,
    policy: PlacementPolicy,
    request: PlacementRequest,
    loads: list[InstanceLoad],
    chosen: Placement,
    largest_degree: int,
    page_size: int,
) -> list[dict[str, Any]]:
    """The step at every degree, each placed as the policy places a request whose degree is pinned; or why it cannot have that degree."""
    prices: list[dict[str, Any]] = []
    for degree in range(1, largest_degree + 1):
        try:
            placement = chosen if degree == chosen.degree else policy.place(replace(request, degree=degree), loads, page_size)
        except ValueError as error:
            prices.append({"degree": degree, "refused": str(error) if isinstance(error, CapacityError) else "not with these pins"})
            continue
        if placement.degree == degree:
            fits = _fits_now(placement, loads, page_size)
            prices.append({"degree": degree, "home": placement.home, "step_ms": step_ms(cost, loads, placement), "fits_now": fits})
    return prices


def _fits_now(placement: Placement, loads: list[InstanceLoad], page_size: int) -> bool:
    pages = zip(placement.shards, (-(-tokens // page_size) for tokens in placement.shard_tokens), strict=True)
    return all(count * page_size <= loads[rank].free_tokens for rank, count in pages)


def _read_instances(path: Path) -> list[dict[str, int]]:
    """Of a --load file. ValueError naming the file and what is wrong with it."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"--load {path}: not JSON: {error}") from error
    instances = data.get("instances") if isinstance(data, dict) else None
    if not isinstance(instances, list) or not instances:
        raise ValueError(f'--load {path}: expected {{"instances": [...]}} with an object for each instance')
    for rank, item in enumerate(instances):
        if not isinstance(item, dict) or not LOAD_NEEDED <= set(item) <= LOAD_LEAST.keys():
            raise ValueError(f"--load {path}, instance {rank}: expected the keys {sorted(LOAD_LEAST)}, got {item}")
        for key, value in item.items():
            if type(value) not in (int, float) or not LOAD_LEAST[key] <= value < math.inf:
                raise ValueError(f"--load {path}, instance {rank}: {key} must be a number of at least {LOAD_LEAST[key]}, got {value!r}")
    return instances


def _load(rank: int, item: dict[str, int], pool_tokens: int | None, per_node: int) -> InstanceLoad:
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
