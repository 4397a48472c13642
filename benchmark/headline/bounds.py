"""What placement can gain at most, simulated by the constants that a server takes: every request whole, ours, and KV that lies even for
nothing.

    python -m benchmark.headline.bounds OUTPUT [--gpus 2,4,8] [--mixes 0.01,0.03,0.05] [--seeds 8] [--seconds 120] --commit ID

Per number of GPUs and mix the highest rate under a limit on P99 TPOT, and for coding agents' lengths, which fill the pools before they
reach it, P99 of TPOT and of the wait for room at some rates. `even` is the better of ours and of every request over all instances, both
where sharded rows cost no time beyond their attention: what a perfect exchange would give. P99 is the mean of the windows' of all seeds.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from benchmark.headline.judge import Point
from benchmark.headline.predict import predicted
from benchmark.headline.summary import SHORT_STEPS
from benchmark.headline.traffic import WEKA, Mix, mix_name, parse_mix

RESULTS = Path(__file__).resolve().parents[1] / "results"
CARD, HISTORY_MS = "NVIDIA H200", 20.0
MOST_RATE_PER_GPU, SHORT_RATE_PER_GPU = 16.0, 6.0
WEKA_RATES_PER_GPU = (0.3, 0.45, 0.6)
FACTS = ("model", "layers", "pool_tokens", "longest", "longest_output")
"""Of a headline.json, what predict.py asks for beside a point."""
HALVINGS = 7
"""The highest rate is found to an eighth of a request per second and GPU."""
FIGURES = P50, P99, WAIT = "p50_tpot_ms", "p99_tpot_ms", "p99_wait_s"
EVEN = "even"
SERVERS: dict[str, tuple[tuple[str, bool], ...]] = {
    "whole": (("whole", False),),
    "ours": (("ours", False),),
    EVEN: (("ours", True), ("static-dcp", True)),
}
"""What is simulated for each: contenders of predict.py, and whether their sharded rows are free. The best of them counts."""


@dataclass(frozen=True)
class Cluster:
    """facts: what holds for all points of a headline.json."""

    facts: dict[str, Any]
    num_gpus: int
    seeds: Sequence[int]
    seconds: float

    def means(self, contender: str, mix: Mix, rate: float, *, is_free: bool = False) -> dict[str, float]:
        """FIGURES of windows that began loaded, the means of all seeds."""
        facts = self.facts | {"machine": f"{self.num_gpus} x {CARD}"}
        found: Point = {"requests": 0, "requests_per_s": rate, "seconds": self.seconds, "history_ms": HISTORY_MS}
        most = MOST_RATE_PER_GPU * self.num_gpus
        windows = [predicted(facts, contender, mix, seed, found, most_rate=most, is_free=is_free) for seed in self.seeds]
        return {figure: mean(window[figure] for window in windows) for figure in FIGURES}

    def limit_ms(self) -> float:
        """As the comparison's: so many loaded steps without long prompts."""
        return SHORT_STEPS * self.means("whole", 0.0, SHORT_RATE_PER_GPU * self.num_gpus)[P50]

    def highest_rate(self, contender: str, mix: Mix, limit_ms: float, *, is_free: bool) -> float:
        """Requests per second; 0.0 where none is held."""
        low, high = 0.0, MOST_RATE_PER_GPU * self.num_gpus
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            if self.means(contender, mix, middle, is_free=is_free)[P99] <= limit_ms:
                low = middle
            else:
                high = middle
        return low


def rates(cluster: Cluster, mix: Mix, limit_ms: float) -> dict[str, Any]:
    """Highest rates of a mix, and each over that of whole."""
    found = {
        server: max(cluster.highest_rate(name, mix, limit_ms, is_free=is_free) for name, is_free in simulated)
        for server, simulated in SERVERS.items()
    }
    over = {server: found["whole"] and value / found["whole"] for server, value in found.items()}
    return _row(cluster, mix, over, rates=found) | {"limit_ms": round(limit_ms, 1)}


def latencies(cluster: Cluster, mix: Mix, rate: float) -> dict[str, Any]:
    """P99 of TPOT and of the wait for room at one rate, and the TPOT of whole over each."""
    means = {
        server: [cluster.means(name, mix, rate, is_free=is_free) for name, is_free in simulated] for server, simulated in SERVERS.items()
    }
    found = {figure: {server: min(one[figure] for one in ways) for server, ways in means.items()} for figure in (P99, WAIT)}
    over = {server: value and found[P99]["whole"] / value for server, value in found[P99].items()}
    return _row(cluster, mix, over, **found) | {"requests_per_s": rate}


def _row(cluster: Cluster, mix: Mix, over: dict[str, float], **found: dict[str, float]) -> dict[str, Any]:
    rounded = {figure: {server: round(value, 2) for server, value in values.items()} for figure, values in found.items()}
    over_whole = {server: round(value, 3) for server, value in over.items() if server != "whole"}
    return {"gpus": cluster.num_gpus, "mix": mix_name(mix), **rounded, "over_whole": over_whole}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--gpus", default="2,4,8")
    parser.add_argument("--mixes", default="0.01,0.03,0.05")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--commit", required=True)
    args = parser.parse_args()
    headline = json.loads((RESULTS / "headline.json").read_text())
    facts = {key: headline[key] for key in FACTS}
    result: dict[str, Any] = {
        "command": f"python -m benchmark.headline.bounds headline_bounds.json --gpus {args.gpus} --mixes {args.mixes} --seeds {args.seeds} "
        f"--seconds {args.seconds:g}",
        "commit": args.commit,
        "machine": "simulated",
        "card": CARD,
        **facts,
        "seeds": args.seeds,
        "seconds": args.seconds,
        "rates": [],
        "latencies": [],
    }
    for num_gpus in map(int, args.gpus.split(",")):
        cluster = Cluster(facts, num_gpus, range(1, args.seeds + 1), args.seconds)
        limit_ms = cluster.limit_ms()
        for mix in map(parse_mix, args.mixes.split(",")):
            result["rates"].append(rates(cluster, mix, limit_ms))
            print(result["rates"][-1], flush=True)
        for rate in WEKA_RATES_PER_GPU:
            result["latencies"].append(latencies(cluster, WEKA, rate * num_gpus))
            print(result["latencies"][-1], flush=True)
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
