"""`python -m benchmark.simulate.conversations.plot`: docs/figures/conversations.png from the stored rows: hit share over pool size.

On the left simulated at full size, on the right real servers with small pools beside the simulator at the times of the server.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmark.simulate.plots import pyplot

ROOT = Path(__file__).resolve().parents[3]
RESULT = ROOT / "benchmark" / "results" / "conversations_simulated.json"
STYLES = {
    "stock": ("SGLang, turns land anywhere", "#888888", "s"),
    "sticky": ("sticky router, a tree per instance", "#3b7dd8", "^"),
    "ours": ("ours, sequences over all pools", "#d1495b", "o"),
    "pooled": ("bound: one pool", "#444444", "x"),
}
SERVED_RESULT = RESULT.with_name("conversations_served.json")
SERVED = {
    "stock": ("SGLang, its own balancing", "#888888", "s"),
    "off": ("ours, nothing retained", "#c9a227", "D"),
    "sticky": ("SGLang, sticky client", "#3b7dd8", "^"),
    "on": ("ours, sequences retained", "#d1495b", "o"),
}


def draw_simulated(axis: Any, result: dict[str, Any]) -> None:
    for column, (label, colour, marker) in STYLES.items():
        points = sorted((row["pool_tokens"], row["hit_share"]) for row in result["rows"] if row["column"] == column)
        sizes, shares = zip(*points, strict=True)
        axis.plot([size / 1e6 for size in sizes], shares, color=colour, marker=marker, label=label)
    axis.set(xlabel="million KV tokens per instance", ylabel="prompt tokens found in a cache", ylim=(0, 1))
    axis.set_title(f"simulated, {result['instances']} instances, {result['rate']:g} request/s, {result['num_turns']} turns", fontsize=10)
    axis.legend(frameon=False, fontsize=8)


def draw_served(axis: Any, result: dict[str, Any]) -> None:
    """A filled mark per server, a line for the simulator."""
    rows = sorted(result["rows"], key=lambda row: row["pool_tokens"])
    for column, (_, colour, marker) in STYLES.items():
        points = [(row["pool_tokens"], row["simulated"][column]) for row in rows if "simulated" in row]
        if points:
            axis.plot(*zip(*points, strict=True), color=colour, marker=marker, markerfacecolor="none", linewidth=1)
    for name, (label, colour, marker) in SERVED.items():
        points = [(row["pool_tokens"], row["servers"][name]["hit_share"]) for row in rows if name in row["servers"]]
        if points:
            axis.plot(*zip(*points, strict=True), color=colour, marker=marker, linestyle="", markersize=9, label=label)
    axis.set(xlabel="KV tokens per instance", ylim=(0, 1))
    axis.set_title(f"served, {result['instances']} instances on a CPU (hollow: simulated)", fontsize=10)
    axis.legend(frameon=False, fontsize=8)


def main() -> None:
    plt = pyplot()
    figure, axes = plt.subplots(ncols=2, figsize=(11, 4))
    draw_simulated(axes[0], json.loads(RESULT.read_text()))
    draw_served(axes[1], json.loads(SERVED_RESULT.read_text()))
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "figures" / "conversations.png", dpi=130)


if __name__ == "__main__":
    main()
