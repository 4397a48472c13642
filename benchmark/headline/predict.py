"""What the simulator says beside every measured point: the same arrivals, placed by the same policy, priced by the constants that a server
takes for this model and card.

    python -m benchmark.headline.predict FILE      # writes `predicted` into every point of a headline.json

SGLang's own kernels (`stock`, `ours-fa3`) are priced as ours: where they are slower, or its scheduler is, measured and predicted differ by
that.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from benchmark.headline.judge import WARM_SHARE, Point, percentile
from benchmark.headline.traffic import arrivals
from benchmark.multi_gpu.model_shapes import SHAPES, SMALL_SHAPES
from benchmark.simulate.engine import Simulation
from benchmark.simulate.settings import SimulationSettings
from sglang_dcp.policy.attention_table import OUR_SPLIT, STOCK_SPLIT
from sglang_dcp.policy.expected_output import EXPECTED_NEW_TOKENS
from sglang_dcp.policy.placement import make_policy
from sglang_dcp.policy.served_model import ServedModel, served_cost

PAGE, MOST_RUNNING = 64, 128
COMMAND = "python -m benchmark.headline.predict FILE"


@dataclass(frozen=True)
class Placing:
    """How a contender places. static: every request over all instances."""

    policy: str
    splits: bool = False
    static: bool = False
    split_budget: str = OUR_SPLIT


PLACING = {
    "stock": Placing("local"),
    "local": Placing("local"),
    "whole": Placing("dual-balance"),
    "whole-stock-split": Placing("dual-balance", split_budget=STOCK_SPLIT),
    "length-buckets": Placing("length-buckets", splits=True),
    "static-dcp": Placing("fixed", splits=True, static=True),
    "ours": Placing("dual-balance", splits=True),
    "ours-fa3": Placing("dual-balance", splits=True),
}


def predicted(result: dict[str, Any], name: str, long_share: float, seed: int, found: Point) -> dict[str, Any]:
    """Mean time per token of the requests of one point, and their degrees. result: what holds for all points of a headline.json."""
    placing, count = PLACING[name], int(result["machine"].split(" x ")[0])
    config = SimpleNamespace(**(SHAPES | SMALL_SHAPES)[result["model"]], num_hidden_layers=result["layers"])
    cost = served_cost(None, ServedModel.of_config(config, result["machine"]), count, placing.split_budget).model
    most = count if placing.splits else 1
    policy = make_policy(
        placing.policy,
        num_instances=count,
        page_size=PAGE,
        cost_model=cost,
        degree=count if placing.static else None,
        max_degree=most,
        max_guest_fraction=1.0,
    )
    settings = SimulationSettings(
        num_instances=count,
        pool_tokens=result["pool_tokens"],
        page_size=PAGE,
        max_running=MOST_RUNNING,
        max_new_tokens=result["longest_output"],
        max_degree=most,
        overload_fraction=1.0,
        first_estimate=EXPECTED_NEW_TOKENS,
    )
    seconds = found["requests"] / found["requests_per_s"]
    drawn = arrivals(long_share, found["requests_per_s"], seconds, seed, result["longest"], result["longest_output"])
    simulation = Simulation([(one.at_s, one.prompt_tokens, one.output_tokens) for one in drawn], policy, cost, settings)
    simulation.run()
    measured = [one for one in simulation.requests[int(WARM_SHARE * len(drawn)) :] if one.finish > 0]
    tpot = [(one.finish - one.admitted) / one.output * 1000 for one in measured]
    degrees = Counter(one.start_degree for one in measured)
    return {
        "p50_tpot_ms": round(percentile(tpot, 0.5), 3),
        "p99_tpot_ms": round(percentile(tpot, 0.99), 3),
        "mean_tpot_ms": round(sum(tpot) / len(tpot), 3),
        "degrees": {str(degree): degrees[degree] for degree in sorted(degrees)},
    }


def as_measured(points: Sequence[Point]) -> list[Point]:
    """What was predicted, as judge.py takes what was measured; points without a prediction are left out."""
    return [found | found["predicted"] | {"p99_ttft_s": 0.0, "failed": {}} for found in points if "predicted" in found]


def add_predictions(result: dict[str, Any]) -> None:
    """`predicted` in every point. The cases are named "share|seed"."""
    result["predictions"] = COMMAND
    for case_name, contenders in result["cases"].items():
        share, seed = case_name.split("|")
        for name, case in contenders.items():
            for found in case["points"]:
                found["predicted"] = predicted(result, name, float(share), int(seed), found)


def main() -> int:
    path = Path(sys.argv[1])
    result = json.loads(path.read_text())
    add_predictions(result)
    path.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
