"""All simulated comparisons, resumable: `python -m benchmark.simulate.experiments GROUP` adds what is missing to benchmark/results.

Seed 0 was used while the policy was built; comparisons use seeds 1 to 5.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmark.simulate.groups import (
    FIRST_GUESS,
    GROUPS,
    LIMITS,
    MAIN,
    MAX_SECONDS,
    MIN_REQUESTS,
    SCALED_CONSTANTS,
    SECONDS,
    SEEDS,
    SENSITIVITY_LIMITS,
    SENSITIVITY_SECONDS,
)
from benchmark.simulate.rate_search import RateSearch
from benchmark.simulate.results import SimulationResult
from benchmark.simulate.variants import Deployment, simulate
from benchmark.simulate.workloads import Workload, load_workload

RESULTS = Path(__file__).parents[1] / "results"


def run_seconds(rate: float, workload: str) -> float:
    """Length of a run. Session workloads keep one length, so that thinning draws the same sessions at every rate."""
    return 600.0 if workload == "weka" else min(MAX_SECONDS, max(SECONDS, MIN_REQUESTS / rate))


def point(result: SimulationResult) -> dict[str, Any]:
    """What is kept of one simulated rate."""
    data = result.as_dict()
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in data.items()}


def search_case(
    deployment: Deployment,
    workload: Workload,
    policy: str,
    seed: int,
    limits: Sequence[tuple[str, float]],
    guess: float,
    *,
    known: dict[str, Any] | None = None,
    near: dict[str, float] | None = None,
    seconds: float | None = None,
    overrides: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Highest rates under `limits` and every simulated rate on the way. A `known` case lends its rates and points and is extended;
    `near` are the rates of a like case, by limit, to look at first."""

    def evaluate(rate: float) -> SimulationResult:
        span = run_seconds(rate, workload.name) if seconds is None else max(seconds, min(MAX_SECONDS, MIN_REQUESTS / rate))
        requests = workload.requests(rate, span, seed)
        return simulate(policy, deployment, workload, requests, **(overrides or {}))

    search = RateSearch(evaluate, guess)
    rates: dict[str, float] = {}
    if known is not None:
        search.points.update({float(rate): SimulationResult(**row) for rate, row in known["points"].items()})
        rates.update(known["max_rate"])
    for statistic, limit in limits:
        name = f"{statistic}-{limit:g}"
        if name not in rates:
            rates[name] = round(search.highest_rate(limit, statistic, (near or {}).get(name)), 4)
    return {"max_rate": rates, "points": {f"{rate:.4f}": point(result) for rate, result in sorted(search.points.items())}}


class ResultFile:
    """A JSON file of cases, saved after each."""

    def __init__(self, name: str) -> None:
        self.path = RESULTS / f"simulation_{name}.json"
        self.data: dict[str, Any] = {"cases": {}}
        if self.path.is_file():
            self.data = json.loads(self.path.read_text(encoding="utf-8"))

    def add(self, key: str, case: dict[str, Any]) -> None:
        """Stores a case with the commit and machine it was made by."""
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        self.data["command"] = f"python -m benchmark.simulate.experiments {self.path.stem.removeprefix('simulation_')}"
        self.data["machine"] = platform.processor() or platform.machine()
        self.data["cases"][key] = {**case, "commit": commit}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.data, separators=(",", ":")) + "\n", encoding="utf-8")


def like_case(file: ResultFile, deployment: Deployment, workload: str, policy: str) -> dict[str, float]:
    """Rates of the same policy and workload: another seed of the deployment, else the main deployment's, else none."""
    for cases, label in ((file.data["cases"], deployment.label()), (ResultFile("bars").data["cases"], Deployment().label())):
        for seed in SEEDS:
            case = cases.get(f"{label}|{workload}|{policy}|{seed}")
            if case:
                return dict(case["max_rate"])
    return {}


def run_sensitivity(constants: Sequence[str] = SCALED_CONSTANTS, max_seed: int = max(SEEDS)) -> None:
    """chat + 1 %: every constant at 0.7 and 1.3 of its value, with the policy fitted to the same constant."""
    file, workload = ResultFile("sensitivity"), load_workload("chat-1pct")
    scales = (None, *((constant, factor) for constant in constants for factor in (0.7, 1.3)))
    for seed, scale in ((seed, scale) for seed in SEEDS if seed <= max_seed for scale in scales):
        deployment = Deployment(scale=scale)
        for policy in ("dual-balance", "length-buckets", "local-least-batch"):
            key = f"{deployment.label()}|chat-1pct|{policy}|{seed}"
            known = file.data["cases"].get(key)
            if known is None or any(f"{statistic}-{limit:g}" not in known["max_rate"] for statistic, limit in SENSITIVITY_LIMITS):
                near = like_case(file, deployment, "chat-1pct", policy)
                options: dict[str, Any] = {"known": known, "near": near, "seconds": SENSITIVITY_SECONDS}
                file.add(key, search_case(deployment, workload, policy, seed, SENSITIVITY_LIMITS, 60.0, **options))
                print(key, file.data["cases"][key]["max_rate"], flush=True)


def run_equal_rate() -> None:
    """Adds one run per policy at the very rate that the best data-parallel baseline holds at 75 ms: nothing is interpolated there.

    For the groups `bars` (with the oracle that pays the exchange) and `long-run`.
    """
    bounds = ResultFile("oracle-exchange")
    for group in ("bars", "long-run"):
        file, seconds = ResultFile(group), GROUPS[group].get("seconds")
        policies = dict.fromkeys(MAIN, file) | ({"oracle-exchange": bounds} if group == "bars" else {})
        for workload_name in GROUPS[group]["workloads"]:
            workload = load_workload(workload_name)
            for seed in SEEDS:
                keys = {policy: f"{Deployment().label()}|{workload_name}|{policy}|{seed}" for policy in policies}
                rate = max(file.data["cases"][keys[policy]]["max_rate"]["p99-75"] for policy in MAIN if policy.startswith("local"))
                requests = workload.requests(rate, seconds or run_seconds(rate, workload_name), seed)
                for policy, key in keys.items():
                    case = policies[policy].data["cases"][key]
                    if f"{rate:.4f}" not in case["points"]:
                        case["points"][f"{rate:.4f}"] = point(simulate(policy, Deployment(), workload, requests))
                        policies[policy].add(key, case)
                        print(f"{key} at {rate:.4f}: {case['points'][f'{rate:.4f}']['p99_tpot_ms']} ms", flush=True)


def run_group(name: str, max_seed: int = max(SEEDS), policies: Sequence[str] = (), workloads: Sequence[str] = ()) -> None:
    """Runs what is missing of a group, all policies of a workload and seed together; a case that lacks a limit is extended.

    `policies` and `workloads` narrow the group down; empty means all of it.
    """
    group = GROUPS[name]
    deployment = group.get("deployment", Deployment())
    limits = group.get("limits", LIMITS)
    file = ResultFile(group.get("file", name))
    for seed in (seed for seed in group["seeds"] if seed <= max_seed):
        for workload_name in (workload for workload in group["workloads"] if not workloads or workload in workloads):
            workload, guess = load_workload(workload_name), FIRST_GUESS[workload_name]
            for policy in (policy for policy in group["policies"] if not policies or policy in policies):
                key = f"{deployment.label()}|{workload_name}|{policy}|{seed}"
                known = file.data["cases"].get(key)
                if known is not None and all(f"{statistic}-{limit:g}" in known["max_rate"] for statistic, limit in limits):
                    continue
                started, options = time.perf_counter(), {"seconds": group.get("seconds"), "overrides": group.get("overrides")}
                options["near"] = like_case(file, deployment, workload_name, policy)
                case = search_case(deployment, workload, policy, seed, limits, guess, known=known, **options)
                guess = case["max_rate"].get("p99-75") or guess
                file.add(key, case)
                print(f"{key} {case['max_rate']} {len(case['points'])} runs {time.perf_counter() - started:.0f} s", flush=True)


def main() -> None:
    """Command line: group names; `all` runs every group in order of value."""
    parser = argparse.ArgumentParser(prog="python -m benchmark.simulate.experiments", description=__doc__)
    parser.add_argument("groups", nargs="+", choices=[*GROUPS, "equal-rate", "sensitivity", "all"])
    parser.add_argument("--max-seed", type=int, default=max(SEEDS), help="leave out the cases of higher seeds (they can be added later)")
    parser.add_argument("--policy", action="append", default=[], help="only this policy of the groups; repeat for several")
    parser.add_argument("--workload", action="append", default=[], help="only this workload of the groups; repeat for several")
    parser.add_argument("--constant", action="append", choices=SCALED_CONSTANTS, help="with sensitivity: only this constant")
    args = parser.parse_args()
    names = args.groups
    for name in (*GROUPS, "equal-rate", "sensitivity") if "all" in names else names:
        if name == "equal-rate":
            run_equal_rate()
        elif name == "sensitivity":
            run_sensitivity(args.constant or SCALED_CONSTANTS, args.max_seed)
        else:
            run_group(name, args.max_seed, args.policy, args.workload)


if __name__ == "__main__":
    main()
