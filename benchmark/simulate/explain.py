"""`python -m benchmark.simulate.explain`: why a measured gain differs from a stated one, from the stored cases, as Markdown.

Each question has one answer that a case decides: how far could any policy get (the oracle), at which limit and with which tail of prompts
does a stated ratio appear, which constant moves it, and which definition of latency gives the published P99 ratio.
"""

from __future__ import annotations

import math
from typing import Any

from benchmark.simulate.groups import GROUPS
from benchmark.simulate.summary import BUCKETS, DATA_PARALLEL, ORACLE, OURS, Cases, compare, interval, load_cases, value_at, value_inside
from benchmark.simulate.variants import Deployment

# Files with whole comparisons; `sensitivity` and `ablation` hold variants.
FILES = ("bars", "kimi", "tight-pool", "long-run", "tail", "tail-kimi", "tail-tight", "order-global", "order-any", "qwen", "azure", "h100")
BASE = Deployment().label()
PUBLISHED_RATE, PUBLISHED_P99 = (1.88, 3.27), (1.79, 2.12)
P99_RATES = {
    "chat-1pct": (40, 50, 60, 70, 80, 87, 95, 100, 110, 120),
    "chat-5pct": (26, 30, 35, 40, 45, 50, 54, 60),
    "weka": (5.0, 6.0, 7.0, 7.5, 8.0, 8.2),
    "mooncake": (40, 50, 60, 64, 69, 75, 80, 84),
}
PREFILL_RATE = 2.29
P99_KEYS = {"from admission, per request": "p99_tpot_ms", "from admission, per token": "p99_gap_ms", "from arrival": "p99_latency_ms"}


def explain() -> dict[str, Any]:
    """Everything that the explaining figures and tables show."""
    bars = load_cases("bars")
    return {
        "gain_by_limit": {workload: gain_by_limit(bars, workload) for workload in P99_RATES},
        "gain_elsewhere": gain_elsewhere(),
        "oracle_with_exchange": {workload: oracle_with_exchange(bars, workload) for workload in P99_RATES},
        "over_each_baseline": {workload: over_each_baseline(bars, workload) for workload in P99_RATES},
        "p99_ratio": {workload: p99_ratios(bars, workload) for workload in P99_RATES},
        "prefill_same": prefill_same(),
        "ablation": against_ours("ablation", GROUPS["ablation"]["policies"]),
        "moves": against_ours("moves", ("dual-moves",)),
        "baselines": against_ours("baselines", GROUPS["baselines"]["policies"]),
        "sensitivity": sensitivity(),
    }


def gain_by_limit(cases: Cases, workload: str) -> dict[str, Any]:
    """Ratios over the best data-parallel baseline per limit: ours, the buckets', and the oracle's, which nothing can pass."""
    ratios = compare(cases, BASE, workload).get("ratios", {})
    names = {"over_best_dp": OURS, "length_buckets_over_best_dp": BUCKETS, "oracle_over_best_dp": ORACLE}
    return {limit: {names[name]: row for name, row in rows.items() if name in names} for limit, rows in ratios.items()}


def oracle_with_exchange(cases: Cases, workload: str) -> dict[str, Any]:
    """What perfect balance reaches that pays the fixed part of the exchange: rates and P99 over the best data-parallel baseline."""
    found: dict[str, list[float]] = {}
    for key, bound in sorted(load_cases("oracle-exchange").items()):
        of_seed = {name[2]: case for name, case in cases.items() if name[:2] == (BASE, workload) and name[3] == key[3]}
        if key[1] != workload or not {OURS, *DATA_PARALLEL} <= set(of_seed):
            continue
        ours, best = of_seed[OURS], max((of_seed[name] for name in DATA_PARALLEL), key=lambda case: case["max_rate"]["p99-75"])
        for limit, rate in bound["max_rate"].items():
            theirs = max(of_seed[name]["max_rate"][limit] for name in DATA_PARALLEL)
            found.setdefault(f"rate over the best data-parallel one, {limit}", []).append(rate / theirs if theirs else math.inf)
            found.setdefault(f"ours over the bound, {limit}", []).append(ours["max_rate"][limit] / rate)
        rate = best["max_rate"]["p99-75"]
        p99 = [value_at(case, rate, "p99_tpot_ms") for case in (best, bound, ours)]
        found.setdefault("P99 of data parallelism over it, at the rate that holds 75 ms", []).append(p99[0] / p99[1])
        found.setdefault("P99 of data parallelism over ours, same rate", []).append(p99[0] / p99[2])
    return {name: interval(values) for name, values in found.items()}


def over_each_baseline(cases: Cases, workload: str) -> dict[str, Any]:
    """Rates of ours, the buckets and the oracle over each single baseline: a published figure has one baseline, not the better of two."""
    round_robin = {key: case for key, case in load_cases("baselines").items() if key[2] == "local-round-robin"}
    both, found = {**cases, **round_robin}, {}
    for baseline in (*DATA_PARALLEL, "local-round-robin"):
        for policy in (OURS, BUCKETS, ORACLE):
            rows = {}
            for limit in ("p99-50", "p99-55", "p99-60", "p99-75", "p99-100"):
                values = []
                for seed in sorted({key[3] for key in both if key[:3] == (BASE, workload, baseline)}):
                    upper, lower = both.get((BASE, workload, policy, seed)), both[BASE, workload, baseline, seed]
                    if upper and limit in upper["max_rate"] and lower["max_rate"].get(limit):
                        values.append(upper["max_rate"][limit] / lower["max_rate"][limit])
                if values:
                    rows[limit] = interval(values)
            if rows:
                found[f"{policy} over {baseline}"] = rows
    return found


def gain_elsewhere() -> dict[str, Any]:
    """The same ratios of every other deployment and workload, by file."""
    found: dict[str, Any] = {}
    for name in FILES:
        cases = load_cases(name)
        for deployment, workload in sorted({(key[0], key[1]) for key in cases}):
            comparison = compare(cases, deployment, workload)
            if comparison and name != "bars":
                kept = ("over_best_dp", "over_length_buckets", "length_buckets_over_best_dp", "oracle_over_best_dp")
                found[f"{name}|{deployment}|{workload}"] = {
                    "data_parallel": comparison["data_parallel"],
                    **{limit: {key: rows[key] for key in kept if key in rows} for limit, rows in comparison["ratios"].items()},
                }
    return found


def p99_ratios(cases: Cases, workload: str) -> dict[str, Any]:
    """Per definition and baseline: P99 of the baseline over ours by rate, where at least three seeds are stable and simulated there."""
    seeds = sorted({key[3] for key in cases if key[:3] == (BASE, workload, OURS)})
    found: dict[str, Any] = {}
    for title, key in P99_KEYS.items():
        for baseline in DATA_PARALLEL:
            rows = []
            for rate in P99_RATES[workload]:
                values = []
                for seed in seeds:
                    theirs, mine = cases.get((BASE, workload, baseline, seed)), cases.get((BASE, workload, OURS, seed))
                    if theirs and mine:
                        values.append(value_inside(theirs, rate, key) / value_inside(mine, rate, key))
                finite = [value for value in values if math.isfinite(value)]
                if len(finite) >= 3:
                    rows.append([rate, interval(finite)])
            found[f"{title}|{baseline}"] = rows
    return found


def against_ours(name: str, policies: tuple[str, ...]) -> dict[str, Any]:
    """Highest rates of variants over those of the full policy on the same seeds."""
    cases, bars, found = load_cases(name), load_cases("bars"), {}
    for workload in GROUPS[name]["workloads"]:
        for policy in policies:
            pairs = [
                (case, bars.get((BASE, workload, OURS, key[3]))) for key, case in sorted(cases.items()) if key[1:3] == (workload, policy)
            ]
            rows = {}
            for limit in ("p99-60", "p99-75", "p99-100"):
                values = [case["max_rate"][limit] / full["max_rate"][limit] for case, full in pairs if full and limit in case["max_rate"]]
                if values:
                    rows[limit] = interval(values)
            if rows:
                found[f"{workload}|{policy}"] = rows
    return found


def prefill_same() -> dict[str, Any]:
    """Chunked prefill on the same instances: highest rates at 300 ms, and P99 over ours at one rate, for data parallelism may hold none."""
    cases = load_cases("prefill-same")
    ours = {key[3]: case for key, case in sorted(cases.items()) if key[2] == "dual-prefill-same"}
    found = {OURS: interval([case["max_rate"]["p99-300"] for case in ours.values()])}
    for baseline in DATA_PARALLEL:
        theirs = {key[3]: case for key, case in sorted(cases.items()) if key[2] == f"{baseline}-prefill-same"}
        found[baseline] = interval([case["max_rate"]["p99-300"] for case in theirs.values()])
        found[f"P99 of {baseline} over ours at {PREFILL_RATE:g} requests/s"] = interval(
            [
                value_inside(case, PREFILL_RATE, "p99_tpot_ms") / value_inside(ours[seed], PREFILL_RATE, "p99_tpot_ms")
                for seed, case in theirs.items()
            ]
        )
    return found


def sensitivity() -> dict[str, Any]:
    """Gain over least batch and over the buckets with one constant scaled (one run length for all); a limit with all three policies."""
    cases = load_cases("sensitivity")
    found: dict[str, Any] = {}
    for deployment in dict.fromkeys(key[0] for key in cases):
        rows = {}
        for limit in ("p99-60", "p99-75"):
            held = {key[2:]: case["max_rate"][limit] for key, case in cases.items() if key[0] == deployment and limit in case["max_rate"]}
            seeds = sorted(seed for policy, seed in held if policy == OURS)
            seeds = [seed for seed in seeds if (BUCKETS, seed) in held and ("local-least-batch", seed) in held]
            if seeds:
                rows[limit] = {
                    "ours": interval([held[OURS, seed] for seed in seeds]),
                    "over_local_least_batch": interval([_ratio(held[OURS, seed], held["local-least-batch", seed]) for seed in seeds]),
                    "over_length_buckets": interval([_ratio(held[OURS, seed], held[BUCKETS, seed]) for seed in seeds]),
                }
        if rows:
            found[deployment.removeprefix(BASE).removeprefix("-") or "as measured"] = rows
    return found


def _ratio(upper: float, lower: float) -> float:
    return upper / lower if lower else math.inf


def shown(row: dict[str, Any] | None) -> str:
    """`1.69 +-0.33` or `1.69` for one seed; `none held` where the lower rate is 0."""
    if not row:
        return ""
    if row["mean"] is None:
        return "none held"
    return f"{row['mean']:.2f}" + (f" +-{row['half_width']:.2f}" if row["half_width"] is not None else "")


def main() -> None:
    """Prints the tables of docs/research_guide.md."""
    data = explain()
    for workload, by_limit in data["gain_by_limit"].items():
        for limit, rows in by_limit.items():
            print(f"| {workload} | {limit} | " + " | ".join(shown(rows.get(policy)) for policy in (OURS, BUCKETS, ORACLE)) + " |")
    for workload, pairs in data["over_each_baseline"].items():
        for pair, rows in pairs.items():
            print(f"| {workload} | {pair} | " + " | ".join(f"{limit}: {shown(row)}" for limit, row in rows.items()) + " |")
    for workload, rows in data["oracle_with_exchange"].items():
        for name, row in rows.items():
            print(f"| {workload} | {name} | {shown(row)} |")
    for name, row in data["prefill_same"].items():
        print(f"| prefill on the same instances | {name} | {shown(row)} | {row['values']} |")
    for key, rows in data["gain_elsewhere"].items():
        for limit in (limit for limit in rows if limit != "data_parallel"):
            cells = [shown(rows[limit].get(name)) for name in ("over_best_dp", "length_buckets_over_best_dp", "oracle_over_best_dp")]
            print(f"| {key} | {limit} | " + " | ".join(cells) + f" | {len(rows['data_parallel'])} baselines |")
    for group in ("ablation", "moves", "baselines"):
        for key, rows in data[group].items():
            print(f"| {group} {key} | " + " | ".join(f"{limit}: {shown(row)}" for limit, row in rows.items()) + " |")
    for constant, rows in data["sensitivity"].items():
        for limit, row in rows.items():
            cells = [shown(row[name]) for name in ("ours", "over_local_least_batch", "over_length_buckets")]
            print(f"| sensitivity {constant} | {limit} | " + " | ".join(cells) + f" | {row['ours']['seeds']} seeds |")
    for workload, by_definition in data["p99_ratio"].items():
        for key, points in by_definition.items():
            print(f"| {workload} | {key} | " + ", ".join(f"{rate:g}: {shown(row)}" for rate, row in points) + " |")


if __name__ == "__main__":
    main()
