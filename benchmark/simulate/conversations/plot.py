"""`python -m benchmark.simulate.conversations.plot`: docs/figures/conversations.png from the stored rows: hit share over pool size."""

from __future__ import annotations

import json
from pathlib import Path

from benchmark.simulate.plots import pyplot

ROOT = Path(__file__).resolve().parents[3]
RESULT = ROOT / "benchmark" / "results" / "conversations_simulated.json"
STYLES = {
    "stock": ("SGLang, turns land anywhere", "#888888", "s"),
    "sticky": ("sticky router, a tree per instance", "#3b7dd8", "^"),
    "ours": ("ours, sequences over all pools", "#d1495b", "o"),
    "pooled": ("bound: one pool", "#444444", "x"),
}


def main() -> None:
    result = json.loads(RESULT.read_text())
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(7, 4))
    for column, (label, colour, marker) in STYLES.items():
        points = sorted((row["pool_tokens"], row["hit_share"]) for row in result["rows"] if row["column"] == column)
        sizes, shares = zip(*points, strict=True)
        axis.plot([size / 1e6 for size in sizes], shares, color=colour, marker=marker, label=label)
    axis.set(xlabel="million KV tokens per instance", ylabel="prompt tokens found in a cache", ylim=(0, 1))
    axis.set_title(f"simulated, {result['instances']} instances, {result['rate']:g} request/s, {result['num_turns']} turns", fontsize=10)
    axis.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "figures" / "conversations.png", dpi=130)


if __name__ == "__main__":
    main()
