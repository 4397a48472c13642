"""The simulator beside what was measured: the results hold what it says now, and that is near."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmark.gpu_runtime.measured_steps import steps
from benchmark.headline.contenders import contenders
from benchmark.headline.predict import PLACING, WindowClock, add_predictions, predicted

RESULTS = Path(__file__).resolve().parents[3] / "benchmark" / "results"
RESULT = json.loads((RESULTS / "headline.json").read_text())
MAIN_CASE = RESULT["two_gpus"]["case"]


def test_every_contender_has_a_placing() -> None:
    assert set(PLACING) == set(contenders(2)) | set(contenders(4)) | set(contenders(8))


def test_the_results_hold_what_the_simulator_says() -> None:
    """After a change of constants or policy: python -m benchmark.headline.predict benchmark/results/headline.json."""
    again = copy.deepcopy(RESULT)
    add_predictions(again)
    assert again == RESULT


@pytest.mark.parametrize("name", ["whole", "ours"])
def test_the_level_under_open_arrivals_is_within_15_percent(name: str) -> None:
    """The constants are of runs before this one. SGLang's own runtime is not priced; docs/results/prices.md shows what all cases took."""
    for found in RESULT["cases"][MAIN_CASE][name]["points"]:
        for key in ("p50_tpot_ms", "p99_tpot_ms", "mean_tpot_ms"):
            assert found["predicted"][key] == pytest.approx(found[key], rel=0.15), (found["requests_per_s"], key)


def test_level_and_difference_of_a_step_that_the_gpu_sets_are_within_15_percent() -> None:
    found = [step for step in steps() if step.bound == "gpu"]
    assert len(found) >= 8 and max(abs(step.error) for step in found) <= 0.15
    # What sharding costs, of equal layers and card: measured and predicted.
    by_what = {step.what: step for step in found}
    pairs = [(by_what[what], by_what[what.replace("s16", "s0")]) for what in by_what if what.endswith("graph_s16")]
    for sharded, whole in pairs:
        measured, price = sharded.measured_ms - whole.measured_ms, sharded.predicted_ms - whole.predicted_ms
        assert price == pytest.approx(measured, rel=0.25) and len(pairs) == 2


def test_a_step_of_few_layers_lasts_as_long_as_the_host_takes() -> None:
    errors = sorted(abs(step.error) for step in steps() if step.bound == "host")
    assert len(errors) > 15 and errors[len(errors) // 2] <= 0.15, "single ones scatter: they are the host's"


def test_a_wall_is_predicted_where_long_rows_are_not_split() -> None:
    """FlashInfer's own split, placed alike: from 66 rows on an instance none is split. At 12 requests/s 28 ms become 140."""
    ratios = []
    for rate in (8.0, 12.0):
        point = {"requests_per_s": rate, "requests": int(35 * rate)}
        ours, stock = (predicted(RESULT, name, 0.03, 1, point)["p99_tpot_ms"] for name in ("whole", "whole-stock-split"))
        ratios.append(stock / ours)
    assert ratios[0] < 1.2 and ratios[1] > 4


WINDOW = {"requests_per_s": 8.0, "requests": 300, "seconds": 20.0, "history_ms": 20.0}


def test_a_window_that_begins_loaded_is_predicted_inside_alone() -> None:
    """At 8 requests/s a run that begins empty has the same level at last; degrees come from the pins."""
    found = {name: predicted(RESULT, name, 0.03, 1, WINDOW) for name in ("whole", "whole-only", "ours", "fixed-2")}
    assert set(found["whole"]["degrees"]) == {"1"} and found["whole"] == found["whole-only"]
    assert "2" in found["fixed-2"]["degrees"] and found["fixed-2"]["mean_tpot_ms"] > found["ours"]["mean_tpot_ms"]
    empty = predicted(RESULT, "ours", 0.03, 1, {"requests_per_s": 8.0, "requests": 400})
    assert found["ours"]["mean_tpot_ms"] == pytest.approx(empty["mean_tpot_ms"], rel=0.25)
    weka = predicted(RESULT, "ours", "weka", 1, WINDOW | {"requests_per_s": 1.0})
    assert 0 < weka["mean_tpot_ms"] <= weka["p99_tpot_ms"]


class Steps:
    """A simulation of one request whose steps last 0.5 s."""

    def __init__(self, output: int, admitted: float = 0.0) -> None:
        self.clock, self.step, self.output = 0.0, 0, output
        self.requests = [SimpleNamespace(output=output, admitted=admitted, finish=-1.0, finish_step=output, decoded=0)]

    def run(self, clock: WindowClock, until: float) -> list[float]:
        one = self.requests[0]
        while self.clock < until:
            self.clock, self.step = self.clock + 0.5, self.step + 1
            if self.step == self.output:
                one.finish, one.finish_step = self.clock, -1
            clock(self)  # type: ignore[arg-type]
        clock.end(self)  # type: ignore[arg-type]
        return clock.tpot_ms(self.requests)  # type: ignore[arg-type]


@pytest.mark.parametrize("output", [60, 1000], ids=["ends inside", "goes on"])
def test_the_window_clock_counts_steps_inside(output: int) -> None:
    assert Steps(output).run(WindowClock(40.0), 50.0) == [pytest.approx(500.0)]


def test_a_simulation_that_ends_inside_is_measured_until_then() -> None:
    """At 30 s: 6 s are not measured, the rest is."""
    assert Steps(60).run(WindowClock(40.0), 30.0) == [pytest.approx(500.0)]
    assert Steps(60).run(WindowClock(400.0), 30.0) == [], "nothing ran in the measured part"
