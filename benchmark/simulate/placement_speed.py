"""Time of one placement: `python -m benchmark.simulate.placement_speed` writes benchmark/results/policy_placement.json."""

from __future__ import annotations

import json
import platform
import random
import subprocess
import time
from pathlib import Path

from sglang_dcp.policy.cost_model import load_cost_model
from sglang_dcp.policy.placement import make_policy
from sglang_dcp.policy.types import InstanceLoad, PlacementRequest

RESULT = Path(__file__).parents[1] / "results" / "policy_placement.json"
PAGE, POOL = 64, 1_104_000
# Placements timed together: reading the thread's clock costs as much as a placement.
BLOCK = 50


def measure(num_instances: int, policy_name: str, long_share: float, count: int, node_size: int = 8) -> dict[str, float]:
    """Microseconds per placement: least, median and worst block of `BLOCK`; loads change with every placement."""
    draw = random.Random(1)
    cost = load_cost_model("deepseek-v3.h200", num_instances)
    policy = make_policy(
        policy_name,
        num_instances=num_instances,
        page_size=PAGE,
        cost_model=cost,
        degree=None,
        max_degree=num_instances,
        max_guest_fraction=1.0,
    )
    loads = [
        InstanceLoad(i, i // node_size, draw.randrange(100_000, 250_000), POOL, draw.randrange(0, 90_000), draw.randrange(55, 75), 80)
        for i in range(num_instances)
    ]
    requests = [
        PlacementRequest(draw.randrange(30_000, 400_000) if draw.random() < long_share else draw.randrange(50, 4000), 600, 4096)
        for _ in range(count)
    ]
    times = []
    for start in range(0, count, BLOCK):
        block = requests[start : start + BLOCK]
        changes = [(draw.randrange(num_instances), draw.randrange(55, 75), draw.randrange(100_000, 250_000)) for _ in block]
        started = time.thread_time()
        for request, (rank, batch, kv_tokens) in zip(block, changes, strict=True):
            policy.place(request, loads, PAGE)
            loads[rank].home_requests, loads[rank].kv_tokens = batch, kv_tokens
        times.append((time.thread_time() - started) * 1e6 / BLOCK)
    times.sort()
    return {"least_block_us": round(times[0], 1), "median_us": round(times[len(times) // 2], 1), "worst_block_us": round(times[-1], 1)}


def main() -> None:
    """Measures every policy at 32, 72 and 4,096 instances in nodes of eight, and at 72 in nodes of twelve."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    report = {
        "command": "python -m benchmark.simulate.placement_speed",
        "machine": f"{platform.machine()}, Python {platform.python_version()}, shared with servers: CPU time of the thread",
        "commit": commit,
        "limits_us": {"32": 50, "72": 50, "4096": 1000},
        "cases": {},
    }
    for num_instances, node_size, count in ((32, 8, 4000), (72, 8, 4000), (72, 12, 4000), (4096, 8, 500)):
        for policy in ("dual-balance", "length-buckets", "local"):
            for name, share in (("short", 0.0), ("chat-1pct", 0.01), ("all-long", 1.0)):
                case = measure(num_instances, policy, share, count, node_size)
                size = num_instances if node_size == 8 else f"{num_instances} in nodes of {node_size}"
                report["cases"][f"{size}|{policy}|{name}"] = case
                print(size, policy, name, case, flush=True)
    RESULT.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
