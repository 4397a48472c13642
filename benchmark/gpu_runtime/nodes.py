"""Four instances as two nodes of two on one Hopper GPU: exactness and graphs of real servers, the exchange of two nodes over that of one.

    PYTHONPATH=python:sgl-kernel-dcp/python python -m benchmark.gpu_runtime.nodes OUT_DIR [--limit 500] [--only gqa4_nodes,mla4_nodes]

Writes OUT_DIR/nodes.json after every part (benchmark/results/nodes.json holds one): `exchange_2x2_over_2`, the worst of the kinds of
attention; `sharded_graph_share`, of decode steps with sharded rows those that ran as graphs, the least of the cases. --device cpu serves
the same cases without a GPU, without graphs and times. What two real hosts would show, one GPU does not.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmark.serving.provenance import provenance

CASES = "gqa4_nodes,mla4_nodes"
CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"
"""Instances that share a process wait for each other on streams of their own; servers do not."""
MOST_RATIO = 1.1
"""Of an exchange of two nodes at once over that of one."""


def serve(out: Path, only: str, device: str, limit_s: float) -> dict[str, Any]:
    """Stages of every case (testing/gpu/runtime_check.py); its logs and its report are in `out`."""
    command = [sys.executable, "-m", "testing.gpu.runtime_check", str(out), "--limit", str(limit_s), "--only", only, "--device", device]
    done = subprocess.run(command, env={key: value for key, value in os.environ.items() if key != CONNECTIONS}, check=False)
    path = out / "runtime_check.json"
    checks = json.loads(path.read_text())["checks"] if path.is_file() else {}
    return {"held": done.returncode == 0, "cases": {name: summarise(found) for name, found in checks.items()}}


def summarise(case: dict[str, Any]) -> dict[str, Any]:
    """What held, per stage, with the differences from stock."""
    stages = {
        name: {"ok": stage["ok"], "seconds": stage["seconds"], "steps": stage["steps"]} | differences(stage)
        for name, stage in case["stages"].items()
    }
    nodes = case["stages"].get("nodes", {})
    told = {key: nodes[key] for key in ("sharded_graph_share", "opened", "counts") if key in nodes}
    return {"complete": bool(case.get("complete")), **told, "stages": stages}


def differences(stage: dict[str, Any]) -> dict[str, float]:
    return {key: round(stage["all"][key], 6) for key in ("mean", "p99", "max")} if "all" in stage else {}


def conclude(found: dict[str, Any]) -> dict[str, Any]:
    """The figures, and what they must be; absent where a part did not run."""
    shares = [case.get("sharded_graph_share") for case in found.get("served", {}).get("cases", {}).values()]
    ratios = [kind["exchange_2x2_over_2"] for kind in found.get("exchange", {}).values()]
    figures: dict[str, Any] = {}
    if shares and None not in shares:
        figures["sharded_graph_share"] = min(shares)
    if ratios:
        figures["exchange_2x2_over_2"] = max(ratios)
    bars = {"sharded_graph_share": figures.get("sharded_graph_share") == 1.0, "served": bool(found.get("served", {}).get("held"))}
    if ratios:
        bars["exchange_2x2_over_2"] = max(ratios) <= MOST_RATIO
    return figures | {"bars": bars}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--limit", type=float, default=500.0, help="seconds for the served cases")
    parser.add_argument("--only", default=CASES, help="cases of testing/gpu/runtime_cases.py; between waves a slash")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--commit", default=None, help="commit to record where the tree has no git history")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = provenance(" ".join(["python", "-m", "benchmark.gpu_runtime.nodes", *sys.argv[1:]]))
    found["commit"] = args.commit or found["commit"]

    def save() -> None:
        (args.out / "nodes.json").write_text(json.dumps(found | conclude(found), indent=1) + "\n")

    if args.device == "cuda":
        os.environ.setdefault(CONNECTIONS, "32")
        import torch

        from benchmark.kernels.nodes import measure_nodes

        found["card"], found["exchange"] = torch.cuda.get_device_name(), measure_nodes()
        print(json.dumps(found["exchange"]), flush=True)
        save()
        torch.cuda.empty_cache()
    found["served"] = serve(args.out, args.only, args.device, args.limit)
    save()
    print(json.dumps(conclude(found)), flush=True)
    return 0 if found["served"]["held"] else 1


if __name__ == "__main__":
    sys.exit(main())
