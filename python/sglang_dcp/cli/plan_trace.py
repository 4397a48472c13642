"""`sglang-dcp plan --trace`: which degrees a trace would get, how many pools it needs, and what fits, beside whole requests."""

from __future__ import annotations

import argparse
from collections import Counter
from typing import Any

from sglang_dcp.cli import plan_cache
from sglang_dcp.cli.values import refuse_given
from sglang_dcp.observe.tables import align
from sglang_dcp.policy.placement import make_policy
from sglang_dcp.policy.served_model import serving_cost
from sglang_dcp.policy.types import InstanceLoad
from sglang_dcp.traces.occupancy import Occupancy, arrivals, occupy
from sglang_dcp.traces.reader import read_trace

WHOLE = "local-least-kv"
"""What every plan of a trace is compared with: each request whole in one pool."""
OF_A_LOAD = ("prompt", "expected_new", "degree", "home")
OF_A_TRACE = ("instances", "rate", "limit", "cache_fraction")
INSTANCES, LIMIT = 8, 20_000
DEGREE_RANGES = ((1, 1), (2, 2), (3, 4), (5, 8), (9, 1 << 30))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags that only a trace has."""
    parser.add_argument("--instances", type=int, help=f"with --trace: number of instances (default {INSTANCES})")
    parser.add_argument("--rate", type=float, help="with --trace: stretch its clock to this many requests/s (default: as it is)")
    parser.add_argument("--limit", type=int, help=f"with --trace: requests to place, from its start (default {LIMIT})")
    plan_cache.add_arguments(parser)


def refuse_unread(args: argparse.Namespace) -> None:
    """ValueError for a flag that a plan of this kind would pass over."""
    names, where = (OF_A_LOAD, "with --trace") if args.trace else (OF_A_TRACE, "with --load")
    refuse_given(args, names, where)


def make_trace_plan(args: argparse.Namespace) -> dict[str, Any]:
    """The plan as JSON values. Raises ValueError naming what is wrong with the trace or a flag, FileNotFoundError."""
    num_instances = INSTANCES if args.instances is None else args.instances
    limit = LIMIT if args.limit is None else args.limit
    if num_instances < 1 or limit < 1:
        raise ValueError(f"--instances {num_instances} and --limit {limit} must be at least 1")
    trace = read_trace(args.trace, args.trace_format, strict=args.strict)
    served = serving_cost(args.cost_model, num_instances, args.kv_dtype)
    cost = served.model
    pool = args.pool_tokens or cost.pool_tokens
    if not pool:
        raise ValueError(f"cost model {cost.name} knows no pool for {num_instances} instances: give --pool-tokens or more --instances")
    requests = arrivals(trace, args.rate, limit)
    lengths = sorted(item.prompt_tokens + item.output_tokens for item in requests)
    policies = {}
    for name in dict.fromkeys((args.policy, WHOLE)):
        max_degree = 1 if name.startswith("local") else args.policy_degree or num_instances
        policy = make_policy(
            name,
            num_instances=num_instances,
            page_size=args.page_size,
            cost_model=cost,
            degree=args.policy_degree,
            max_degree=num_instances,
            max_guest_fraction=1.0,
        )
        loads = [InstanceLoad(rank, rank // cost.gpus_per_node, 0, pool) for rank in range(num_instances)]
        options = {"page_size": args.page_size, "max_new_tokens": args.max_new, "max_degree": max_degree}
        policies[name] = _summary(occupy(requests, policy, cost, loads, **options), pool)
    plan = {
        "trace": trace.describe(),
        "format": trace.format,
        "skipped": len(trace.skipped),
        "requests": len(requests),
        "cost_model": served.description,
        "warnings": list(served.warnings),
        "instances": num_instances,
        "pool_tokens": pool,
        "p50_tokens": _quantile(lengths, 0.5),
        "p99_tokens": _quantile(lengths, 0.99),
        "longest_tokens": lengths[-1],
        "beyond_one_pool": sum(tokens > pool for tokens in lengths),
        "policies": policies,
    }
    if args.cache_fraction is not None:
        step_s = policies[args.policy]["p50_step_ms"] / 1000
        plan["cache"] = plan_cache.plan_cache(args.cache_fraction, trace, requests, cost, num_instances, pool, step_s)
    return plan


def format_trace_plan(plan: dict[str, Any]) -> str:
    """The plan as text."""
    pool, total = plan["pool_tokens"], plan["requests"]
    lines = [
        *plan["trace"],
        *(f"warning: {text}" for text in plan["warnings"]),
        f"{plan['instances']} instances of {pool:,} KV tokens ({plan['cost_model']}); prompt + output: P50 {plan['p50_tokens']:,}, "
        f"P99 {plan['p99_tokens']:,}, longest {plan['longest_tokens']:,} tokens",
        f"{plan['beyond_one_pool']} of {total} requests are longer than one pool",
        "",
    ]
    rows = [["", *plan["policies"]]]
    results = list(plan["policies"].values())
    rows.append(["never fit", *(str(item["never_fit"]) for item in results)])
    rows.append(["find no room at arrival", *(str(item["no_room_at_arrival"]) for item in results)])
    for name in results[0]["degree_shares"]:
        rows.append([f"degree {name}", *(f"{100 * item['degree_shares'][name]:.1f} %" for item in results)])
    rows.append(["most requests at once", *(f"{item['peak_requests']:,}" for item in results)])
    rows.append(["most KV tokens at once", *(f"{item['peak_tokens']:,}" for item in results)])
    rows.append(["pools for them", *(str(item["pools_needed"]) for item in results)])
    rows.append(["predicted step, P50", *(f"{item['p50_step_ms']:.2f} ms" for item in results)])
    rows.append(["predicted step, P99", *(f"{item['p99_step_ms']:.2f} ms" for item in results)])
    cache = plan_cache.format_cache_plan(plan["cache"]) if "cache" in plan else []
    return "\n".join([*lines, align(rows), *cache])


def _summary(result: Occupancy, pool: int) -> dict[str, Any]:
    steps = sorted(result.steps_ms)
    return {
        "never_fit": result.num_refused,
        "no_room_at_arrival": result.num_without_room,
        "degree_shares": _shares(result.degrees),
        "peak_requests": result.peak_requests,
        "peak_tokens": result.peak_tokens,
        "pools_needed": -(-result.peak_tokens // pool),
        "p50_step_ms": _quantile(steps, 0.5) if steps else 0.0,
        "p99_step_ms": _quantile(steps, 0.99) if steps else 0.0,
    }


def _shares(degrees: Counter[int]) -> dict[str, float]:
    total = max(1, degrees.total())
    names = [str(low) if low == high else f"{low} to {high}" if high < 1 << 20 else f"{low} and more" for low, high in DEGREE_RANGES]
    counts = [sum(count for degree, count in degrees.items() if low <= degree <= high) for low, high in DEGREE_RANGES]
    return {name: count / total for name, count in zip(names, counts, strict=True)}


def _quantile(ordered: list[Any], share: float) -> Any:
    """Nearest rank of sorted values."""
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
