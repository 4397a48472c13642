"""docs/results/prices.md: what the cost model says beside every kernel and step that was measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmark.gpu_runtime.measured_steps import Step, steps
from benchmark.headline.traffic import mix_title
from benchmark.kernels.measured import Measured, Shape, by_shape, price_us
from scripts.result_pages.markdown import load, page, source, table
from sglang_dcp.policy.attention_table import STOCK_SPLIT

TEXT = """
Policy, simulator and `sglang-dcp plan` use one function (`policy/cost_model.py`) with these constants; a server says
at start which it takes. `python -m benchmark.kernels.measured` fits the constants of attention to the kernels below, a test holds them
to it.
""".strip()
LEVEL = """
Level of a step: fitted to `whole` of [the comparison](headline.md) and to a step of 24 layers on H200. `ours` and H100 were kept
apart, and H100's own constants follow H200's by memory bandwidth.
Steps that are too short for the GPU to set them last as long as the host takes. `stock` is priced as ours without a sharded row.
""".strip()


def render() -> str:
    kernels, calibrated = by_shape(), load("calibrated.json")
    found = list(steps())
    return page(
        "Prices beside what was measured",
        TEXT,
        "## Attention, largest error by shape",
        table(SHAPE_HEADINGS, _shapes(kernels)),
        "## Fitted on a machine by `sglang-dcp calibrate`",
        source("calibrated.json", calibrated),
        table(["pool", "seconds", "what it said"], _runs(calibrated["runs"])),
        "## Decode steps",
        LEVEL,
        table(["open arrivals, 2 x H200, 48 layers", "mean TPOT measured, ms", "simulated, ms", "error"], _arrivals()),
        table(["fixed load", "step measured, ms", "price, ms", "error"], [_step(step) for step in found if step.bound == "gpu"]),
        "Set by the host:",
        table(["fixed load", "step measured, ms", "price, ms", "error"], [_step(step) for step in found if step.bound == "host"]),
        "## Every kernel",
        *(part for shape, rows in kernels.items() for part in (_title(shape, rows), table(ROW_HEADINGS, map(_row, rows)))),
    )


SHAPE_HEADINGS = ("card, heads/KV heads x head", "long rows split", "sizes measured", "largest error", "of those above 50 us")
ROW_HEADINGS = ("rows", "longest row, tokens", "all tokens", "measured, us", "price, us", "error")


def _runs(runs: dict[str, Any]) -> list[tuple[Any, ...]]:
    return [(name, run["seconds"], run["largest_error"]) for name, run in runs.items()]


def _title(shape: Shape, rows: Sequence[Measured]) -> str:
    sources = ", ".join(sorted({f"`{item.source}`" for item in rows}))
    return f"{shape.card.upper()}, {shape.name}, long rows split {_split(shape)}, {sources}:"


def _split(shape: Shape) -> str:
    return "by FlashInfer" if shape.split == STOCK_SPLIT else "by us" if not shape.latent else "by the kernel"


def _percent(error: float) -> str:
    return f"{100 * error:+.0f} %"


def _shapes(kernels: dict[Shape, list[Measured]]) -> list[tuple[str, ...]]:
    lines = []
    for shape, rows in kernels.items():
        errors = [(price_us(item) / item.row.microseconds - 1, item.row.microseconds) for item in rows]
        worst = [max(some, key=abs) for some in ([e for e, _ in errors], [e for e, us in errors if us > 50]) if some]
        lines.append((f"{shape.card.upper()}, {shape.name}", _split(shape), str(len(rows)), *map(_percent, worst)))
    return lines


def _row(item: Measured) -> tuple[str, ...]:
    row, price = item.row, price_us(item)
    longest = row.longest_row or row.tokens_per_request
    error = _percent(price / row.microseconds - 1)
    return str(row.requests), f"{longest:,}", f"{row.tokens:,}", f"{row.microseconds:.1f}", f"{price:.1f}", error


def _arrivals() -> list[tuple[str, ...]]:
    lines = []
    for case_name, contenders in load("headline.json")["cases"].items():
        mix, seed = case_name.split("|")
        for name, case in contenders.items():
            for found in case["points"]:
                measured, predicted = found["mean_tpot_ms"], found["predicted"]["mean_tpot_ms"]
                label = f"`{name}`, {found['requests_per_s']:g} requests/s, {mix_title(mix).removesuffix(' prompts')}, seed {seed}"
                lines.append((label, f"{measured:.1f}", f"{predicted:.1f}", _percent(predicted / measured - 1)))
    return lines


def _step(step: Step) -> tuple[str, ...]:
    return f"{step.what} (`{step.source}`)", f"{step.measured_ms:.2f}", f"{step.predicted_ms:.2f}", _percent(step.error)
