"""Decode steps of fixed loads that were measured (benchmark/results), beside what the cost model of their server says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from benchmark.multi_gpu.model_shapes import SHAPES, SMALL_SHAPES
from benchmark.multi_gpu.predictions import spread_evenly, work_of
from sglang_dcp.policy.cost_model import CostModel, InstanceWork
from sglang_dcp.policy.served_model import ServedModel, served_cost

RESULTS = Path(__file__).resolve().parents[1] / "results"
ROWS, PROMPT, OUTPUT = 32, 1024, 320
"""Of an instance in benchmark/gpu_runtime/run.py: LOADS. The step is the mean over the output."""


@dataclass(frozen=True)
class Step:
    """bound: "gpu" where layers set the step, "host" where there are too few of them."""

    source: str
    what: str
    bound: str
    measured_ms: float
    predicted_ms: float

    @property
    def error(self) -> float:
        return self.predicted_ms / self.measured_ms - 1


def steps() -> Iterator[Step]:
    """All of them. `stock` is priced as ours without a sharded row."""
    runtime = json.loads((RESULTS / "gpu_runtime.json").read_text())
    for found in (runtime, next(entry for entry in runtime["earlier"] if "step_ms" in entry)):
        yield from _of_runtime("gpu_runtime.json", found)
    quantised = json.loads((RESULTS / "fp8.json").read_text())["unsharded"] | {"model": "qwen3-30b-a3b"}
    yield from _of_runtime("fp8.json", quantised)
    for name in ("multi_gpu.json", "multi_gpu_4.json"):
        yield from _of_parts(name, json.loads((RESULTS / name).read_text()))


def cost_of(model: str, layers: int, machine: str, count: int) -> CostModel:
    config = SimpleNamespace(**(SHAPES | SMALL_SHAPES)[model], num_hidden_layers=layers)
    return served_cost(None, ServedModel.of_config(config, machine), count).model


def _of_runtime(name: str, found: dict[str, Any]) -> Iterator[Step]:
    cost = cost_of(found["model"], found["layers"], found["machine"], 2)
    tokens = ROWS * (PROMPT + OUTPUT // 2)
    for case, times in found["step_ms"].items():
        sharded = int(case.rsplit("_s", 1)[1])
        work = InstanceWork(tokens, ROWS + sharded, ROWS, routed_out=sharded, routed_in=sharded)
        card = found["machine"].split(" x ")[-1].removeprefix("NVIDIA ")
        what = f"{found['layers']} layers of {found['model']}, 2 x {card}, {case}"
        predicted = cost.step_us([work, work]) / 1000
        bound = "host" if predicted <= cost.host_step_us / 1000 else "gpu"
        yield Step(name, what, bound, times["median_ms"], predicted)


def _of_parts(name: str, found: dict[str, Any]) -> Iterator[Step]:
    count = found["num_gpus"]
    for letter in "de":
        figures = found["parts"].get(letter, {}).get("figures", {})
        if not figures.get("rows"):
            continue
        cost = cost_of(found["model"], figures["num_layers"], found["machine"], count)
        alone = [(row, [(0, spread_evenly(row["tokens"], row["degree"], 0, count))]) for row in figures["rows"] if row.get("degree")]
        closed = [(row, row["placements"]) for row in figures.get("closed", [])]
        for row, placements in [*alone, *closed]:
            if row["step_ms"]:
                label = row.get("population") or f"{row['tokens']:,} tokens at degree {row['degree']}"
                what = f"{figures['num_layers']} layers of {found['model']}, {count} x H200, {row['server']}, {label}"
                yield Step(name, what, "host", row["step_ms"], cost.step_us(work_of(placements, count)) / 1000)
