"""All simulated comparisons, resumable: `python -m benchmark.simulate.experiments GROUP` adds what is missing to benchmark/results.

Seed 0 was used while the policy was built; comparisons use seeds 1 to 5.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

from benchmark.simulate.rate_search import RateSearch
from benchmark.simulate.results import SimulationResult
from benchmark.simulate.variants import Deployment, simulate
from benchmark.simulate.workloads import Workload, load_workload

RESULTS = Path(__file__).parents[1] / "results"
SEEDS = (1, 2, 3, 4, 5)
LIMITS = (("p99", 60.0), ("p99", 75.0), ("p99", 100.0))
ALL_LIMITS = (("p99", 50.0), ("mean", 50.0), *LIMITS, ("mean", 100.0))
MAIN = ("dual-balance", "length-buckets", "local-least-batch", "local-least-kv", "oracle")
# A run sends for this many seconds, longer at low rates so that the P99 rests on enough requests.
SECONDS, MIN_REQUESTS, MAX_SECONDS = 180.0, 4000, 800.0

DP_AND_OURS = ("dual-balance", "length-buckets", "local-least-batch", "local-least-kv")
GROUPS: dict[str, dict[str, Any]] = {
    "bars": {"workloads": ("chat-1pct", "weka", "mooncake", "chat-5pct"), "policies": MAIN, "seeds": SEEDS},
    "kimi": {"deployment": Deployment("kimi-k2"), "workloads": ("chat-1pct",), "policies": DP_AND_OURS, "seeds": SEEDS[:3]},
    "tight-pool": {
        "deployment": Deployment(pool_tokens=1_000_000),
        "workloads": ("chat-1pct",),
        "policies": DP_AND_OURS,
        "seeds": SEEDS[:3],
    },
    "ablation": {
        "workloads": ("chat-1pct", "weka"),
        "policies": ("dual-frozen", "dual-batch-blind", "dual-kv-blind", "dual-degree-1", "dual-exchange-twice", "buckets-exchange-twice"),
        "seeds": (1,),
    },
    # How far the tail of the long prompts carries the gain over data parallelism.
    "tail": {"workloads": ("chat-1pct-heavy",), "policies": ("dual-balance", "length-buckets", "local-least-batch"), "seeds": (1, 2)},
    "short": {"workloads": ("chat-0pct", "servegen-r1"), "policies": MAIN, "seeds": SEEDS[:3]},
    "fixed": {"workloads": ("chat-1pct",), "policies": ("fixed-2", "fixed-4", "fixed-8"), "seeds": (1,)},
    "qwen": {"deployment": Deployment("qwen3-235b-a22b"), "workloads": ("chat-1pct",), "policies": DP_AND_OURS, "seeds": (1,)},
    "azure": {"workloads": ("azure-clock",), "policies": DP_AND_OURS, "seeds": (1,)},
    "h100": {"deployment": Deployment(gpu="h100"), "workloads": ("chat-1pct",), "policies": DP_AND_OURS, "seeds": (1,)},
}
FIRST_GUESS = {
    "chat-0pct": 80.0,
    "chat-1pct": 60.0,
    "chat-1pct-heavy": 40.0,
    "chat-5pct": 35.0,
    "weka": 7.0,
    "mooncake": 60.0,
    "servegen-r1": 35.0,
    "azure-clock": 60.0,
}
# Every constant at +-30 %: `sensitivity` runs these at the 75 ms limit.
SCALED_CONSTANTS = (
    "attention_us_per_token",
    "layer_other_us",
    "dispatch_us_per_request",
    "combine_us_per_request",
    "exchange_fixed_us",
    "exchange_us_per_row",
    "step_fixed_us",
    "expert_weight_us",
)


def run_seconds(rate: float, workload: str) -> float:
    """Length of a run. Session workloads keep one length, so that thinning draws the same sessions at every rate."""
    return 600.0 if workload == "weka" else min(MAX_SECONDS, max(SECONDS, MIN_REQUESTS / rate))


def point(result: SimulationResult) -> dict[str, Any]:
    """What is kept of one simulated rate."""
    data = result.as_dict()
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in data.items()}


def search_case(deployment: Deployment, workload: Workload, policy: str, seed: int, limits, guess: float) -> dict[str, Any]:
    """Highest rates under `limits` and every simulated rate on the way."""

    def evaluate(rate: float) -> SimulationResult:
        return simulate(policy, deployment, workload, workload.requests(rate, run_seconds(rate, workload.name), seed))

    search = RateSearch(evaluate, guess)
    rates = {f"{statistic}-{limit:g}": round(search.highest_rate(limit, statistic), 4) for statistic, limit in limits}
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


def run_sensitivity() -> None:
    """chat + 1 %, seed 1, 75 ms: every constant at 0.7 and 1.3 of its value, with the policy fitted to the same constant."""
    file, workload = ResultFile("sensitivity"), load_workload("chat-1pct")
    for constant in SCALED_CONSTANTS:
        for factor in (0.7, 1.3):
            deployment = Deployment(scale=(constant, factor))
            for policy in ("dual-balance", "length-buckets", "local-least-batch"):
                key = f"{deployment.label()}|chat-1pct|{policy}|1"
                if key not in file.data["cases"]:
                    file.add(key, search_case(deployment, workload, policy, 1, (("p99", 75.0),), 60.0))
                    print(key, file.data["cases"][key]["max_rate"], flush=True)


def run_group(name: str, max_seed: int = max(SEEDS)) -> None:
    """Runs the missing cases of a group, all policies of a workload and seed together."""
    group = GROUPS[name]
    deployment = group.get("deployment", Deployment())
    limits = group.get("limits", LIMITS)
    file = ResultFile("bars" if name == "short" else name)
    for seed in (seed for seed in group["seeds"] if seed <= max_seed):
        for workload_name in group["workloads"]:
            workload, guess = load_workload(workload_name), FIRST_GUESS[workload_name]
            for policy in group["policies"]:
                key = f"{deployment.label()}|{workload_name}|{policy}|{seed}"
                if key in file.data["cases"]:
                    continue
                started = time.perf_counter()
                case = search_case(deployment, workload, policy, seed, limits, guess)
                guess = case["max_rate"].get("p99-75") or guess
                file.add(key, case)
                print(f"{key} {case['max_rate']} {len(case['points'])} runs {time.perf_counter() - started:.0f} s", flush=True)


def main() -> None:
    """Command line: group names; `all` runs every group in order of value."""
    parser = argparse.ArgumentParser(prog="python -m benchmark.simulate.experiments", description=__doc__)
    parser.add_argument("groups", nargs="+", choices=[*GROUPS, "sensitivity", "all"])
    parser.add_argument("--max-seed", type=int, default=max(SEEDS), help="leave out the cases of higher seeds (they can be added later)")
    args = parser.parse_args()
    names = args.groups
    for name in (*GROUPS, "sensitivity") if "all" in names else names:
        if name == "sensitivity":
            run_sensitivity()
        else:
            run_group(name, args.max_seed)


if __name__ == "__main__":
    main()
