"""docs/results/simulation.md: what the simulator says, from its stored cases."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from scripts.result_pages.markdown import load, page, source, table

FIGURES = Path(__file__).resolve().parents[2] / "docs" / "figures"
LIMITS = ("60", "75", "100")
POLICIES = ("dual-balance", "length-buckets", "local-least-batch", "local-least-kv", "oracle")
WORKLOADS = ("chat-1pct", "chat-5pct", "weka", "mooncake", "chat-0pct", "servegen-r1")
NODE_POLICIES, NODE_SIZES = ("dual-balance", "local-least-batch", "local-least-kv"), (8, 12)
OTHERS = {
    "kimi|kimi-k2.h200x32|chat-1pct": "Kimi-K2 on H200",
    "qwen|qwen3-235b-a22b.h200x32|chat-1pct": "Qwen3-235B on H200",
    "h100|deepseek-v3.h100x32|chat-1pct": "DeepSeek-V3 on H100",
}


def render() -> str:
    comparison = json.loads((FIGURES / "comparison.json").read_text())
    placement, nodes = load("policy_placement.json"), load("simulation_nodes.json")
    base = {workload: comparison[f"bars|deepseek-v3.h200x32|{workload}"] for workload in WORKLOADS}
    others = {name: comparison[key] for key, name in OTHERS.items() if key in comparison}
    return page(
        "Simulation, results",
        "DeepSeek-V3 on 32 H200, five seeds, mean and half of the 95 % interval. Limits are on the P99 over requests of mean TPOT; the "
        "oracle is perfect balance at every moment with a free exchange. Model and workloads: [simulation](../simulation.md).",
        "## Highest rate, requests per second",
        table(["workload", "limit, ms", *(f"`{policy}`" for policy in POLICIES)], _rates(base)),
        "## Over the better of two data-parallel baselines",
        table(["workload", "limit, ms", "`dual-balance`", "`length-buckets`", "oracle"], _gains(base) + _gains(others)),
        "## Ablation: rate over that of `dual-balance`",
        _ablation(json.loads((FIGURES / "ablation.json").read_text())),
        "## 72 instances",
        "Nodes of 8 and of 12, P99 of 75 ms, requests per second: every seed of a data-parallel baseline, and ours over the better one.",
        source("simulation_nodes.json", nodes | {"commit": next(iter(nodes["cases"].values()))["commit"]}),
        table(["nodes of", "seed", *(f"`{policy}`" for policy in NODE_POLICIES), "gain"], _nodes(nodes)),
        "## Time of one placement",
        source("policy_placement.json", placement),
        table(["instances, policy, prompts", "CPU time, us (median)"], _placements(placement)),
    )


def _rates(workloads: dict[str, Any]) -> list[tuple[Any, ...]]:
    rows = []
    for workload, case in workloads.items():
        rates = case["max_rate"]
        rows += [(workload, limit, *(_value(rates.get(policy, {}).get(f"p99-{limit}"), 1) for policy in POLICIES)) for limit in LIMITS]
    return rows


def _gains(workloads: dict[str, Any]) -> list[tuple[Any, ...]]:
    names = ("over_best_dp", "length_buckets_over_best_dp", "oracle_over_best_dp")
    rows = []
    for workload, case in workloads.items():
        ratios = case["ratios"]
        rows += [(workload, limit, *(_value(ratios.get(f"p99-{limit}", {}).get(name), 2) for name in names)) for limit in LIMITS]
    return rows


def _value(found: dict[str, Any] | None, digits: int) -> str | None:
    return None if found is None else f"{found['mean']:.{digits}f} +-{found['half_width']:.{digits}f}"


def _ablation(found: dict[str, Any]) -> str:
    workloads = sorted({key.split("|")[0] for key in found})
    variants = list(dict.fromkeys(key.split("|")[1] for key in found))
    columns = [(workload, limit) for workload in workloads for limit in ("60", "75")]
    rows = []
    for variant in variants:
        cases = [found.get(f"{workload}|{variant}", {}).get(f"p99-{limit}") for workload, limit in columns]
        rows.append((f"`{variant}`", *(_value(case, 2) for case in cases)))
    return table(["variant", *(f"{workload}, {limit} ms" for workload, limit in columns)], rows)


def _nodes(result: dict[str, Any]) -> list[tuple[Any, ...]]:
    rows = []
    for size in NODE_SIZES:
        for seed in sorted({key.rsplit("|", 1)[1] for key in result["cases"]}):
            cases = (result["cases"][f"deepseek-v3.h200x72-nodes{size}|chat-1pct|{policy}|{seed}"] for policy in NODE_POLICIES)
            ours, *others = (case["max_rate"]["p99-75"] for case in cases)
            rows.append((size, seed, *(f"{rate:.0f}" for rate in (ours, *others)), f"{ours / max(others):.2f}"))
    return rows


def _placements(result: dict[str, Any]) -> list[tuple[Any, ...]]:
    return [(key.replace("|", ", "), case["median_us"]) for key, case in result["cases"].items() if "dual-balance" in key]
