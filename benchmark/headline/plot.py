"""`python -m benchmark.headline.plot`: docs/figures/headline.png from benchmark/results/headline.json: P99 TPOT over the request rate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

from benchmark.headline.traffic import mix_title

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
NAMES = {"stock": "SGLang, its defaults", "whole": "every request whole, our placement and split", "ours": "ours"}
STYLES = {"stock": ("#888888", "s"), "whole": ("#3b7dd8", "^"), "ours": ("#d1495b", "o")}


def main() -> None:
    result = json.loads((ROOT / "benchmark" / "results" / "headline.json").read_text())
    figure, axis = plt.subplots(figsize=(7, 4))
    shown = result["two_gpus"].get("case", next(iter(result["cases"])))
    for case_name in sorted((name for name in result["cases"] if same_mix(name, shown)), key=lambda name: name != shown):
        draw(axis, result["cases"][case_name], case_name, "-" if case_name == shown else "--")
    axis.set(xlabel="requests per second", ylabel="P99 of mean TPOT, ms", ylim=(0, None))
    axis.set_title(f"{result['machine']}, {result['model']}, {result['layers']} layers, {mix_title(shown.split('|')[0])}", fontsize=10)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "figures" / "headline.png", dpi=130)


def same_mix(case_name: str, other: str) -> bool:
    return case_name.split("|")[0] == other.split("|")[0]


def draw(axis: Axes, case: dict[str, Any], case_name: str, line: str) -> None:
    """A curve for each contender of the case."""
    seed = case_name.split("|")[1]
    for name, found in case.items():
        colour, marker = STYLES.get(name, ("#444444", "x"))
        rates, times = [p["requests_per_s"] for p in found["points"]], [p["p99_tpot_ms"] for p in found["points"]]
        axis.plot(rates, times, line, color=colour, marker=marker, label=f"{NAMES.get(name, name)}, seed {seed}")


if __name__ == "__main__":
    main()
