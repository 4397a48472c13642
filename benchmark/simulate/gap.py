"""`python -m benchmark.simulate.gap --workload chat-1pct --rate 52`: what separates a policy's steps from perfectly balanced ones.

A step of perfect balance carries the same requests with equal KV tokens and batches everywhere and a free exchange (the oracle's step at
this load). The parts add up to the difference, in milliseconds per step, as a mean over the steps after warm-up.
"""

from __future__ import annotations

import argparse
import json

import numpy as np

from benchmark.simulate.engine import Simulation
from benchmark.simulate.experiments import run_seconds
from benchmark.simulate.results import SAMPLE_STEPS, WARM_UP_SHARE
from benchmark.simulate.variants import VARIANTS, Deployment, simulate
from benchmark.simulate.workloads import WORKLOADS, load_workload


def step_parts(simulation: Simulation) -> dict[str, float]:
    """The parts of the step that the cluster's present state would take, milliseconds."""
    cluster, cost = simulation.cluster, simulation.cost
    own = cost.attention_us_per_token * cluster.kv_tokens + cost.attention_us_per_row * cluster.rows
    own += cost.dispatch_us_per_request * cluster.batch
    rows, remote = np.maximum(*cluster.routed[:2]), np.maximum(*cluster.routed[2:])
    exchange = cost.exchange_us_per_row * (rows - np.minimum(rows, remote)) + cost.remote_exchange_us_per_row * remote
    nodes = np.array(cluster.nodes)
    hottest_node = max(float(own[nodes == node].mean()) for node in set(cluster.nodes))
    fixed = cost.exchange_fixed_us if cluster.num_routed else 0.0
    parts = {
        "exchange, fixed part": fixed + (cost.remote_exchange_fixed_us if cluster.num_remote else 0.0),
        "attention, hottest node over the mean": hottest_node - float(own.mean()),
        "attention, hottest instance over its node": float(own.max()) - hottest_node,
        "routed rows of the slowest instance": float((own + exchange).max()) - float(own.max()),
        "combine, largest batch over the mean": cost.combine_us_per_request * float(cluster.batch.max() - cluster.batch.mean()),
    }
    return {name: cost.num_layers * value / 1e3 for name, value in parts.items()}


def gap(policy: str, workload_name: str, rate: float, seed: int) -> dict[str, float]:
    """Means over every eighth step between warm-up and the last arrival."""
    workload, sampled = load_workload(workload_name), []
    requests = workload.requests(rate, run_seconds(rate, workload_name), seed)
    first, last = requests[0][0], requests[-1][0]

    def sample(simulation: Simulation) -> None:
        if simulation.step % SAMPLE_STEPS == 0 and first + WARM_UP_SHARE * (last - first) <= simulation.clock <= last:
            sampled.append(step_parts(simulation))

    result = simulate(policy, Deployment(), workload, requests, step_hook=sample)
    found = {name: round(float(np.mean([row[name] for row in sampled])), 3) for name in sampled[0]}
    return {"mean_tpot_ms": round(result.mean_tpot_ms, 2), **found, "all": round(sum(found.values()), 3)}


def main() -> None:
    """Prints one JSON object."""
    parser = argparse.ArgumentParser(prog="python -m benchmark.simulate.gap", description=__doc__)
    parser.add_argument("--workload", choices=list(WORKLOADS), default="chat-1pct")
    parser.add_argument("--policy", choices=[name for name in VARIANTS if not name.startswith("oracle")], default="dual-balance")
    parser.add_argument("--rate", type=float, default=52.0, help="requests/s")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(json.dumps(gap(args.policy, args.workload, args.rate, args.seed), indent=1))


if __name__ == "__main__":
    main()
