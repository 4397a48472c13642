"""From stored cases to the numbers of docs/simulation.md: means over seeds with 95 % intervals, ratios per seed."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmark.simulate.experiments import RESULTS

# Two-sided 95 % quantile of Student's t by degrees of freedom.
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}
DATA_PARALLEL = ("local-least-batch", "local-least-kv")
OURS, BUCKETS, ORACLE = "dual-balance", "length-buckets", "oracle"
LIMIT_KEYS = ("p99-60", "p99-75", "p99-100")

Cases = dict[tuple[str, str, str, int], dict[str, Any]]


def load_cases(*names: str) -> Cases:
    """Cases of benchmark/results/simulation_<name>.json by (deployment, workload, policy, seed); absent files are left out."""
    cases: Cases = {}
    for name in names:
        path = RESULTS / f"simulation_{name}.json"
        if path.is_file():
            for key, case in json.loads(path.read_text(encoding="utf-8"))["cases"].items():
                deployment, workload, policy, seed = key.split("|")
                cases[deployment, workload, policy, int(seed)] = case
    return cases


def interval(values: Sequence[float]) -> dict[str, Any]:
    """Mean, half width of the 95 % interval over seeds (None for one seed), and each value; what is not finite counts as no value."""
    finite = [value for value in values if math.isfinite(value)]
    half = None
    if len(finite) > 1:
        half = STUDENT[min(4, len(finite) - 1)] * float(np.std(finite, ddof=1)) / math.sqrt(len(finite))
    return {
        "mean": round(float(np.mean(finite)), 3) if finite else None,
        "half_width": None if half is None else round(half, 3),
        "seeds": len(values),
        "values": [round(value, 3) if math.isfinite(value) else None for value in values],
    }


def value_inside(case: dict[str, Any], rate: float, key: str) -> float:
    """`value_at` where the rate lies between simulated stable rates (2 % off at most); NaN elsewhere: nothing is extrapolated."""
    stable = [float(simulated) for simulated, row in case["points"].items() if not row["unstable"] and math.isfinite(row[key])]
    if not stable or not min(stable) * 0.98 <= rate <= max(stable) * 1.02:
        return math.nan
    return value_at(case, rate, key)


def value_at(case: dict[str, Any], rate: float, key: str) -> float:
    """A measured quantity at a rate, interpolated in log-log between the simulated stable rates."""
    rows = sorted((float(r), row[key]) for r, row in case["points"].items() if not row["unstable"] and math.isfinite(row[key]))
    rates, values = np.array([row[0] for row in rows]), np.array([row[1] for row in rows])
    return float(np.exp(np.interp(math.log(rate), np.log(rates), np.log(values))))


def compare(cases: Cases, deployment: str, workload: str) -> dict[str, Any]:
    """Rates per policy and limit, and the ratios that the bars are about, each over the seeds that have what it needs.

    `data_parallel` names the baselines of that kind that were simulated: "best" means the best of those that have the limit.
    """
    by_policy: dict[str, dict[int, dict[str, Any]]] = {}
    for (held, name, policy, seed), case in sorted(cases.items()):
        if held == deployment and name == workload:
            by_policy.setdefault(policy, {})[seed] = case
    baselines = [policy for policy in DATA_PARALLEL if policy in by_policy]
    if OURS not in by_policy or not baselines:
        return {}
    seeds = sorted(set.intersection(*(set(by_policy[policy]) for policy in (OURS, *baselines))))
    limits = sorted({limit for by_seed in by_policy.values() for case in by_seed.values() for limit in case["max_rate"]})
    rates = {
        policy: {limit: interval([case["max_rate"][limit] for case in by_seed.values() if limit in case["max_rate"]]) for limit in limits}
        for policy, by_seed in by_policy.items()
    }
    return {
        "seeds": seeds,
        "data_parallel": baselines,
        "max_rate": {policy: {limit: row for limit, row in by_limit.items() if row["seeds"]} for policy, by_limit in rates.items()},
        "ratios": {limit: _ratios(by_policy, baselines, seeds, limit) for limit in limits},
        "equal_rate": _equal_rate(by_policy, baselines, seeds),
    }


def _ratios(by_policy: dict[str, dict[int, dict[str, Any]]], baselines: Sequence[str], seeds: Sequence[int], limit: str) -> dict[str, Any]:
    def rate(policy: str, seed: int) -> float:
        return float(by_policy.get(policy, {}).get(seed, {"max_rate": {}})["max_rate"].get(limit, math.nan))

    def ratio(upper: Sequence[float], lower: Sequence[float]) -> dict[str, Any]:
        pairs = [_divide(a, b) for a, b in zip(upper, lower, strict=True) if not math.isnan(a) and not math.isnan(b)]
        return interval(pairs)

    ours, buckets, oracle = ([rate(policy, seed) for seed in seeds] for policy in (OURS, BUCKETS, ORACLE))
    of_seed = [[value for value in (rate(policy, seed) for policy in baselines) if not math.isnan(value)] for seed in seeds]
    best = [max(values, default=math.nan) for values in of_seed]
    result = {
        "over_best_dp": ratio(ours, best),
        "over_best_baseline": ratio(ours, [max(a, b) if not math.isnan(b) else a for a, b in zip(best, buckets, strict=True)]),
        "over_length_buckets": ratio(ours, buckets),
        "length_buckets_over_best_dp": ratio(buckets, best),
        "oracle_over_best_dp": ratio(oracle, best),
        "share_of_oracle": ratio(ours, oracle),
        "way_from_buckets_to_oracle": ratio(
            [a - b for a, b in zip(ours, buckets, strict=True)], [a - b for a, b in zip(oracle, buckets, strict=True)]
        ),
    }
    return {name: row for name, row in result.items() if row["seeds"]}


def _divide(left: float, right: float) -> float:
    return left / right if right else math.inf


def _equal_rate(by_policy: dict[str, dict[int, dict[str, Any]]], baselines: Sequence[str], seeds: Sequence[int]) -> dict[str, Any]:
    """Latency of the best DP baseline over ours at one rate, by definition: per request, per token, and counted from arrival.

    At the rate that the baseline holds at 75 ms; and, counted from arrival, at the rate that ours holds there (or the highest at which
    the baseline's queue was still stable), where the baseline's requests wait.
    """
    ratios: dict[str, list[float]] = {"p99_tpot_ms": [], "p99_gap_ms": [], "p99_latency_ms": []}
    ours, at_our_rate, of_oracle = [], [], []
    for seed in (seed for seed in seeds if all("p99-75" in by_policy[policy][seed]["max_rate"] for policy in (OURS, *baselines))):
        best = max(baselines, key=lambda policy: by_policy[policy][seed]["max_rate"]["p99-75"])
        theirs, mine = by_policy[best][seed], by_policy[OURS][seed]
        rate = theirs["max_rate"]["p99-75"]
        if not rate:
            continue
        for key, values in ratios.items():
            values.append(value_inside(theirs, rate, key) / value_inside(mine, rate, key))
        ours.append(value_inside(mine, rate, "p99_tpot_ms"))
        if seed in by_policy.get(ORACLE, {}):
            of_oracle.append(value_inside(theirs, rate, "p99_tpot_ms") / value_inside(by_policy[ORACLE][seed], rate, "p99_tpot_ms"))
        stable = max(float(simulated) for simulated, row in theirs["points"].items() if not row["unstable"])
        rate = min(mine["max_rate"]["p99-75"], stable)
        at_our_rate.append(value_inside(theirs, rate, "p99_latency_ms") / value_inside(mine, rate, "p99_latency_ms"))
    return {
        "our_p99_tpot_ms": interval(ours),
        **{f"ratio_{key}": interval(values) for key, values in ratios.items()},
        "oracle_ratio_p99_tpot_ms": interval(of_oracle),
        "ratio_p99_latency_ms_at_our_rate": interval(at_our_rate),
    }
