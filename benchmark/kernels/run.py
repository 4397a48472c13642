"""Measures the kernels on one Hopper GPU, prints one table and writes benchmark/results/kernels.json.

PYTHONPATH=python:sgl-kernel-dcp/python python -m benchmark.kernels.run [--output FILE] [--commit ID] [--without-attention]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BARS = {
    "tables_us": ("<=", 8.0),
    "exchange_fixed_us": ("<=", 8.0),
    "merge_copy_share": (">=", 0.80),
    "partial_gqa_ratio": (">=", 0.97),
    "mla_decode_ns_per_token": ("<=", 0.49),
    "mla_decode_speedup": (">=", 1.4),
}


def met(value: float, bar: tuple[str, float]) -> bool:
    return value <= bar[1] if bar[0] == "<=" else value >= bar[1]


def commit_id() -> str:
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmark" / "results" / "kernels.json")
    parser.add_argument("--commit", default=None, help="commit to record where the tree has no git history")
    parser.add_argument("--without-attention", action="store_true", help="leave out what needs FlashInfer and FlashMLA")
    arguments = parser.parse_args()
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    import torch

    from benchmark.kernels import exchange, merge, tables, timing

    bandwidth = timing.copy_bandwidth()
    rows, keys = tables.measure()
    parts = [exchange.measure(bandwidth), merge.measure(bandwidth, with_flashinfer=not arguments.without_attention)]
    if not arguments.without_attention:
        from benchmark.kernels import attention

        parts.append(attention.measure())
    for more_rows, more_keys in parts:
        rows.extend(more_rows)
        keys.update(more_keys)
    timing.print_table(rows, bandwidth)
    bars = {name: {"bar": f"{bar[0]} {bar[1]}", "met": met(keys[name], bar)} for name, bar in BARS.items() if name in keys}
    result = {
        "command": "python -m benchmark.kernels.run",
        "card": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "commit": arguments.commit or commit_id(),
        "copy_bandwidth_tb_per_s": round(bandwidth / 1e12, 3),
        **{name: round(value, 4) if isinstance(value, float) else value for name, value in keys.items()},
        "bars": bars,
        "table": [{"kernel": r.name, "us": round(r.microseconds, 2), "bytes": r.bytes, "note": r.note} for r in rows],
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    for name, bar in bars.items():
        print(f"{name} = {keys[name]:.3f} (bar {bar['bar']}): {'met' if bar['met'] else 'NOT MET'}")


if __name__ == "__main__":
    main()
