"""What the simulator says beside every measured point: the same arrivals, placed by the same policy, priced by the constants that a server
takes for this model and card.

    python -m benchmark.headline.predict FILE      # writes `predicted` into every point of a headline.json

SGLang's own split of long rows (`stock`) is priced as ours: where it is slower, or its scheduler is, measured and predicted differ by that.
"""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from benchmark.headline.contenders import REAL_PREFILL
from benchmark.headline.judge import LEAST_TOKENS, WARM_SHARE, WARM_WINDOW_SHARE, Point, percentile
from benchmark.headline.traffic import MOST_RATE, Mix, arrivals, parse_mix
from benchmark.multi_gpu.model_shapes import SHAPES, SMALL_SHAPES
from benchmark.simulate.cluster import SimulatedRequest
from benchmark.simulate.engine import Simulation
from benchmark.simulate.settings import SimulationSettings
from sglang_dcp.policy.attention_table import OUR_SPLIT, STOCK_SPLIT
from sglang_dcp.policy.expected_output import EXPECTED_NEW_TOKENS
from sglang_dcp.policy.placement import make_policy
from sglang_dcp.policy.served_model import ServedModel, served_cost
from sglang_dcp.policy.split import num_pages
from sglang_dcp.policy.types import InstanceLoad, Placement, PlacementPolicy, PlacementRequest

PAGE, MOST_RUNNING = 64, 128
OF_SHARDED_ROWS = (
    "exchange_fixed_us",
    "exchange_us_per_row",
    "remote_exchange_fixed_us",
    "remote_exchange_us_per_row",
    "sharded_step_fixed_us",
    "sharded_step_us_per_row",
)
"""Constants of CostModel that only steps with sharded rows meet."""
COMMAND = "python -m benchmark.headline.predict FILE"


@dataclass(frozen=True)
class Placing:
    """How a contender places. static: every request over all instances. pinned: by dual-balance, over that many; None: unpinned."""

    policy: str
    splits: bool = False
    static: bool = False
    split_budget: str = OUR_SPLIT
    pinned: int | None = None


PLACING = {
    "stock": Placing("local"),
    "local": Placing("local"),
    "whole": Placing("dual-balance", splits=True, pinned=1),
    "whole-only": Placing("dual-balance"),
    "whole-stock-split": Placing("dual-balance", split_budget=STOCK_SPLIT),
    "length-buckets": Placing("length-buckets", splits=True),
    "static-dcp": Placing("fixed", splits=True, static=True),
    **{f"fixed-{count}": Placing("dual-balance", splits=True, pinned=count) for count in (2, 4, 8)},
    "ours": Placing("dual-balance", splits=True),
    "ours-flashinfer": Placing("dual-balance", splits=True),
}


@dataclass
class Pinned:
    """Another policy, asked with every request pinned to a degree, or to its pages where it has fewer."""

    policy: PlacementPolicy
    degree: int

    @property
    def name(self) -> str:
        return f"{self.policy.name}, pinned to {self.degree}"

    def place(self, request: PlacementRequest, loads: Sequence[InstanceLoad], page_size: int) -> Placement:
        degree = min(self.degree, num_pages(request.prompt_tokens, page_size))
        return self.policy.place(replace(request, degree=degree), loads, page_size)


class WindowClock:
    """Step hook of a simulation: how many tokens every request had when the measured part of the window began, and when it ended."""

    def __init__(self, seconds: float) -> None:
        self.times = (WARM_WINDOW_SHARE * seconds, seconds)
        self.seen: list[tuple[float, list[int]]] = []

    def __call__(self, simulation: Simulation) -> None:
        """Notes the first step that ends at or behind each time."""
        while len(self.seen) < len(self.times) and simulation.clock >= self.times[len(self.seen)]:
            self._see(simulation)

    def end(self, simulation: Simulation) -> None:
        """Nothing runs any more: what has not been noted is as it is now."""
        while len(self.seen) < len(self.times):
            self._see(simulation)

    def _see(self, simulation: Simulation) -> None:
        self.seen.append((simulation.clock, [_tokens(one, simulation.step) for one in simulation.requests]))

    def tpot_ms(self, requests: Sequence[SimulatedRequest]) -> list[float]:
        """As judge.tpot_between: of those that got enough tokens between the two, from the first of them on."""
        (start, before), (end, after) = self.seen
        found = []
        for one, first, last in zip(requests, before, after, strict=True):
            if one.admitted >= 0 and last - first >= LEAST_TOKENS:
                until = min(end, one.finish) if one.finish > 0 else end
                found.append((until - max(start, one.admitted)) / (last - first) * 1000)
        return found


def _tokens(request: SimulatedRequest, step: int) -> int:
    """That a request has been given. decoded is exact where it does not run; finish_step tells of those that do."""
    if request.finish > 0:
        return request.output
    return request.output - (request.finish_step - step) if request.finish_step >= 0 else request.decoded


def predicted(
    result: dict[str, Any], name: str, mix: Mix, seed: int, found: Point, *, most_rate: float = MOST_RATE, is_free: bool = False
) -> dict[str, Any]:
    """Mean time per token of the requests of one point, their wait for room, and their degrees. result: what holds for all points of a
    headline.json. most_rate: see traffic.arrivals. is_free: sharded rows cost no time beyond their attention."""
    placing, count = PLACING[name], int(result["machine"].split(" x ")[0])
    config = SimpleNamespace(**(SHAPES | SMALL_SHAPES)[result["model"]], num_hidden_layers=result["layers"])
    cost = served_cost(None, ServedModel.of_config(config, result["machine"]), count, placing.split_budget).model
    cost = replace(cost, **dict.fromkeys(OF_SHARDED_ROWS, 0.0)) if is_free else cost
    most = count if placing.splits else 1
    policy: PlacementPolicy = make_policy(
        placing.policy,
        num_instances=count,
        page_size=PAGE,
        cost_model=cost,
        degree=count if placing.static else None,
        max_degree=most,
        max_guest_fraction=1.0,
    )
    policy = policy if placing.pinned is None else Pinned(policy, placing.pinned)
    settings = _settings(result, count, most)
    seconds, history_ms = found.get("seconds", found["requests"] / found["requests_per_s"]), found.get("history_ms", 0.0)
    drawn = arrivals(mix, found["requests_per_s"], seconds, seed, result["longest"], result["longest_output"], history_ms, most_rate)
    clock = WindowClock(seconds) if history_ms else None
    simulation = Simulation([(one.at_s, one.prompt_tokens, one.output_tokens) for one in drawn], policy, cost, settings, clock)
    simulation.run()
    measured = [one for one in simulation.requests[0 if clock else int(WARM_SHARE * len(drawn)) :] if one.finish > 0]
    tpot = [(one.finish - one.admitted) / one.output * 1000 for one in measured]
    if clock is not None:
        clock.end(simulation)
        tpot = clock.tpot_ms(simulation.requests)
    begin_s = WARM_WINDOW_SHARE * seconds
    waits = [one.admitted - one.arrival for one in simulation.requests if one.admitted >= 0 and one.arrival >= begin_s]
    degrees = Counter(one.start_degree for one in measured)
    return {
        "p50_tpot_ms": round(percentile(tpot, 0.5), 3),
        "p99_tpot_ms": round(percentile(tpot, 0.99), 3),
        "mean_tpot_ms": round(sum(tpot) / len(tpot), 3) if tpot else math.nan,
        "p99_wait_s": round(percentile(waits, 0.99), 3),
        "degrees": {str(degree): degrees[degree] for degree in sorted(degrees)},
    }


def _settings(result: dict[str, Any], count: int, most: int) -> SimulationSettings:
    """most: instances of a request."""
    return SimulationSettings(
        num_instances=count,
        pool_tokens=result["pool_tokens"],
        page_size=PAGE,
        max_running=MOST_RUNNING,
        max_new_tokens=result["longest_output"],
        max_degree=most,
        overload_fraction=1.0,
        first_estimate=EXPECTED_NEW_TOKENS,
    )


def as_measured(points: Sequence[Point]) -> list[Point]:
    """What was predicted, as judge.py takes what was measured; points without a prediction are left out."""
    return [found | found["predicted"] | {"p99_ttft_s": 0.0, "failed": {}} for found in points if "predicted" in found]


def add_predictions(result: dict[str, Any]) -> None:
    """`predicted` in every point, decode alone: prompts that are computed are not priced. The cases are named "mix|seed"."""
    if result.get("prefill") == REAL_PREFILL:
        return
    result["predictions"] = COMMAND
    for case_name, contenders in result["cases"].items():
        mix, seed = case_name.split("|")
        for name, case in contenders.items():
            for found in case["points"]:
                found["predicted"] = predicted(result, name, parse_mix(mix), int(seed), found)


def main() -> int:
    path = Path(sys.argv[1])
    result = json.loads(path.read_text())
    add_predictions(result)
    path.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
