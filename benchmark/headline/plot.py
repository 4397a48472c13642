"""`python -m benchmark.headline.plot`: docs/figures/headline.png from benchmark/results/headline.json: P99 TPOT over the request rate."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

from benchmark.headline.traffic import mix_title

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
NAMES = {"stock": "SGLang, its defaults", "whole": "every request whole, our placement and split", "ours": "ours"}
STYLES = {"stock": ("#888888", "s"), "whole": ("#3b7dd8", "^"), "ours": ("#d1495b", "o")}


def main() -> None:
    result = json.loads((ROOT / "benchmark" / "results" / "headline.json").read_text())
    figure, axis = plt.subplots(figsize=(7, 4))
    shown = result["two_gpus"].get("case", next(iter(result["cases"])))
    for name, case in result["cases"][shown].items():
        points = case["points"]
        colour, marker = STYLES.get(name, ("#444444", "x"))
        rates, times = [p["requests_per_s"] for p in points], [p["p99_tpot_ms"] for p in points]
        axis.plot(rates, times, color=colour, marker=marker, label=NAMES.get(name, name))
    axis.set(xlabel="requests per second", ylabel="P99 of mean TPOT, ms", ylim=(0, None))
    axis.set_title(f"{result['machine']}, {result['model']}, {result['layers']} layers, {mix_title(shown.split('|')[0])}", fontsize=10)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "figures" / "headline.png", dpi=130)


if __name__ == "__main__":
    main()
