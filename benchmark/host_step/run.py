"""Host time of our code per decode step, without a server or a GPU: this checkout, and in turns with it another one.

    python -m benchmark.host_step.run OUT.json [--against CHECKOUT] [--rounds 5]

Steady: 128 rows of each of two instances decode on, 32 of them sharded, and about three begin a page in every step. Changing: in every
fourth step a request of each instance leaves and another joins. What runs is the code that serves, from the driver down to the tables that
a graph reads; SGLang's objects, FlashInfer's planner and the launches are stand-ins, and so is the exchange. So times are ours alone.

It finds where time goes; it does not stand for a GPU server (benchmark/gpu_runtime --only-host). Of what it showed as a ratio of 0.65 at
1a29037, two H200 showed `secure` at 0.4, `tables` at 0.8 and `columns` at 1.0 of 775b857, and new tables that took longer. One H200 showed
a steady step of 293869c at 0.81 of 775b857, and longer new tables again. This benchmark cannot show those: FlashInfer's planner is a
stand-in. Its own budget splits no row of so many and needs no new plan, ours plans when rows join or leave (read, not measured).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmark.serving.provenance import ROOT, provenance

LOADS = ("steady", "changing")


def measure(checkout: Path, load: str) -> dict[str, Any]:
    """One process whose package is `checkout`'s. The benchmark itself is this one's."""
    paths = [checkout / "python", checkout / "sgl-kernel-dcp" / "python", ROOT]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))}
    command = [sys.executable, "-m", "benchmark.host_step.measure", "--load", load]
    ran = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return found


def commit_of(checkout: Path) -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=True).stdout.strip()


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the runs. per_yardstick: of each run's median step over its yardstick, which a busy machine changes alike. changed: of
    the steps alone in which a request joined and one left."""
    parts = sorted({name for run in runs for name in run["parts_p50_us"]})
    median = lambda values: round(statistics.median(values), 1)  # noqa: E731
    changed = [run for run in runs if "changed_p50_us" in run]
    of_changed = (
        {
            "changed_p50_us": median(run["changed_p50_us"] for run in changed),
            "changed_per_yardstick": round(statistics.median(run["changed_p50_us"] / run["yardstick_us"] for run in changed), 3),
        }
        if changed
        else {}
    )
    return {
        "p50_us": median(run["p50_us"] for run in runs),
        "p90_us": median(run["p90_us"] for run in runs),
        "parts_p50_us": {name: median(run["parts_p50_us"].get(name, 0.0) for run in runs) for name in parts},
        "parts_p90_us": {name: median(run["parts_p90_us"].get(name, 0.0) for run in runs) for name in parts},
        "yardstick_us": median(run["yardstick_us"] for run in runs),
        "per_yardstick": round(statistics.median(run["p50_us"] / run["yardstick_us"] for run in runs), 3),
        **of_changed,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--against", type=Path, help="another checkout, measured in turns with this one")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    against = "" if args.against is None else f" --against {commit_of(args.against)}"
    found = provenance(f"python -m benchmark.host_step.run {args.out.name}{against} --rounds {args.rounds}")
    for load in LOADS:
        checkouts = {"here": ROOT} | ({"against": args.against.resolve()} if args.against else {})
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in checkouts}
        for _ in range(args.rounds):
            for name, checkout in checkouts.items():
                runs[name].append(measure(checkout, load))
        found[load] = {name: summary(of_one) for name, of_one in runs.items()}
        print(load, json.dumps(found[load]), flush=True)
        args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
