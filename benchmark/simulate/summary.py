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


def interval(values: Sequence[float]) -> dict[str, float | int | None]:
    """Mean and half width of the 95 % interval over seeds; the half width is None for one seed."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return {"mean": None, "half_width": None, "seeds": len(values)}
    half = None
    if len(finite) > 1:
        half = STUDENT[min(4, len(finite) - 1)] * float(np.std(finite, ddof=1)) / math.sqrt(len(finite))
    return {"mean": round(float(np.mean(finite)), 3), "half_width": None if half is None else round(half, 3), "seeds": len(values)}


def value_at(case: dict[str, Any], rate: float, key: str) -> float:
    """A measured quantity at a rate, interpolated in log-log between the simulated stable rates."""
    rows = sorted((float(r), row[key]) for r, row in case["points"].items() if not row["unstable"] and math.isfinite(row[key]))
    rates, values = np.array([row[0] for row in rows]), np.array([row[1] for row in rows])
    return float(np.exp(np.interp(math.log(rate), np.log(rates), np.log(values))))


def compare(cases: Cases, deployment: str, workload: str) -> dict[str, Any]:
    """Rates per policy and limit, and the ratios that the bars are about, each over the seeds that have all policies needed."""
    by_policy: dict[str, dict[int, dict[str, Any]]] = {}
    for (held, name, policy, seed), case in cases.items():
        if held == deployment and name == workload:
            by_policy.setdefault(policy, {})[seed] = case
    needed = [policy for policy in (OURS, *DATA_PARALLEL, BUCKETS) if policy in by_policy]
    seeds = sorted(set.intersection(*(set(by_policy[policy]) for policy in needed))) if needed else []
    if len(needed) < 4 or not seeds:
        return {}
    rates = {
        policy: {limit: interval([by_seed[s]["max_rate"][limit] for s in seeds if s in by_seed]) for limit in LIMIT_KEYS}
        for policy, by_seed in by_policy.items()
    }
    ratios = {limit: _ratios(by_policy, seeds, limit) for limit in LIMIT_KEYS}
    return {"seeds": seeds, "max_rate": rates, "ratios": ratios, "equal_rate": _equal_rate(by_policy, seeds)}


def _ratios(by_policy: dict[str, dict[int, dict[str, Any]]], seeds: Sequence[int], limit: str) -> dict[str, Any]:
    def rate(policy: str, seed: int) -> float:
        return float(by_policy[policy][seed]["max_rate"][limit])

    best = {seed: max(rate(policy, seed) for policy in DATA_PARALLEL) for seed in seeds}
    result = {
        "over_best_dp": interval([_divide(rate(OURS, s), best[s]) for s in seeds]),
        "over_best_baseline": interval([_divide(rate(OURS, s), max(best[s], rate(BUCKETS, s))) for s in seeds]),
        "over_length_buckets": interval([_divide(rate(OURS, s), rate(BUCKETS, s)) for s in seeds]),
        "length_buckets_over_best_dp": interval([_divide(rate(BUCKETS, s), best[s]) for s in seeds]),
    }
    with_oracle = [s for s in seeds if s in by_policy.get(ORACLE, {})]
    if with_oracle:
        result["share_of_oracle"] = interval([_divide(rate(OURS, s), rate(ORACLE, s)) for s in with_oracle])
        way = [_divide(rate(OURS, s) - rate(BUCKETS, s), rate(ORACLE, s) - rate(BUCKETS, s)) for s in with_oracle]
        result["way_from_buckets_to_oracle"] = interval(way)
    return result


def _divide(left: float, right: float) -> float:
    return left / right if right else math.inf


def _equal_rate(by_policy: dict[str, dict[int, dict[str, Any]]], seeds: Sequence[int]) -> dict[str, Any]:
    """Latency of the best DP baseline over ours at one rate, by definition: per request, per token, and counted from arrival.

    At the rate that the baseline holds at 75 ms; and, counted from arrival, at the rate that ours holds there (or the highest at which
    the baseline's queue was still stable), where the baseline's requests wait.
    """
    ratios: dict[str, list[float]] = {"p99_tpot_ms": [], "p99_gap_ms": [], "p99_latency_ms": []}
    ours, at_our_rate = [], []
    for seed in seeds:
        best = max(DATA_PARALLEL, key=lambda policy: by_policy[policy][seed]["max_rate"]["p99-75"])
        theirs, mine = by_policy[best][seed], by_policy[OURS][seed]
        rate = theirs["max_rate"]["p99-75"]
        if not rate:
            continue
        for key, values in ratios.items():
            values.append(value_at(theirs, rate, key) / value_at(mine, rate, key))
        ours.append(value_at(mine, rate, "p99_tpot_ms"))
        stable = max(float(simulated) for simulated, row in theirs["points"].items() if not row["unstable"])
        rate = min(mine["max_rate"]["p99-75"], stable)
        at_our_rate.append(value_at(theirs, rate, "p99_latency_ms") / value_at(mine, rate, "p99_latency_ms"))
    return {
        "our_p99_tpot_ms": interval(ours),
        **{f"ratio_{key}": interval(values) for key, values in ratios.items()},
        "ratio_p99_latency_ms_at_our_rate": interval(at_our_rate),
    }
