"""Part (f): what the cost model says beside every figure of the parts before."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from benchmark.multi_gpu.settings import Settings, Skipped
from sglang_dcp.policy.cost_model import CostModel, InstanceWork, available_cost_models
from sglang_dcp.policy.served_model import serving_cost

Shards = Sequence[tuple[int, int]]
"""(instance, tokens) of one request."""


def cost_model(shape: str, settings: Settings) -> CostModel:
    """What a server of the shape is placed by on this card."""
    name = "cpu" if settings.dry else f"{shape}.{settings.gpu}"
    if name not in available_cost_models():
        raise Skipped(f"no cost model {name}; there are {', '.join(available_cost_models())}")
    return serving_cost(name, settings.num_gpus).model


def step_ms(model: CostModel, num_layers: int, placements: Sequence[tuple[int, Shards]]) -> float:
    """A decode step of requests that live as (home, shards), with `num_layers` layers instead of the model's."""
    return replace(model, num_layers=num_layers).step_us(work_of(placements, model.num_instances)) / 1000


def work_of(placements: Sequence[tuple[int, Shards]], num_instances: int) -> list[InstanceWork]:
    """What every instance does for requests that live as (home, shards)."""
    n = num_instances
    tokens, rows, homes, out, come = ([0] * n for _ in range(5))
    for home, shards in placements:
        homes[home] += 1
        for rank, count in shards:
            tokens[rank] += count
            rows[rank] += 1
            out[home] += rank != home
            come[rank] += rank != home
    return [InstanceWork(tokens[i], rows[i], homes[i], routed_out=out[i], routed_in=come[i]) for i in range(n)]


def predicted_step_ms(settings: Settings, num_layers: int, tokens: int, degree: int) -> float | None:
    """A step of one request alone; None where the shape has no cost model for this card."""
    try:
        model = cost_model(settings.model, settings)
    except Skipped:
        return None
    return round(step_ms(model, num_layers, [(0, spread_evenly(tokens, degree, 0, settings.num_gpus))]), 4)


def spread_evenly(tokens: int, degree: int, home: int, num_instances: int) -> list[tuple[int, int]]:
    return [((home + i) % num_instances, tokens // degree + (i < tokens % degree)) for i in range(degree)]


def run(settings: Settings, figures: dict[str, Any], save: Callable[[], None]) -> None:
    parts = json.loads(settings.out.read_text())["parts"]
    for letter, of_part in (("a", of_transport), ("d", of_step_time), ("e", of_serving)):
        found = parts.get(letter, {}).get("figures", {})
        if not found.get("rows"):
            figures.setdefault("notes", {})[f"part {letter}"] = "no figures to predict"
            continue
        figures["rows"] += of_part(found, settings)
        save()
    if not figures["rows"]:
        raise Skipped("no earlier part has figures")


def line(part: str, figure: str, measured: float, predicted: float, unit: str) -> dict[str, Any]:
    ratio = round(measured / predicted, 3) if predicted else None
    return {"part": part, "figure": figure, "unit": unit, "measured": round(measured, 3), "predicted": round(predicted, 3), "ratio": ratio}


def of_transport(found: dict[str, Any], settings: Settings) -> list[dict[str, Any]]:
    lines = []
    for row in found["rows"]:
        model = cost_model(row["shape"], settings)
        predicted = model.exchange_fixed_us + model.exchange_us_per_row * row["routed_rows"]
        measured = row["graph_us"] if row["graph_us"] is not None else row["total_us"]
        lines.append(line("a", f"{row['transport']}, {row['shape']}, {row['pattern']}, {row['rows']} rows", measured, predicted, "us"))
    return lines


def of_step_time(found: dict[str, Any], settings: Settings) -> list[dict[str, Any]]:
    model, lines = cost_model(settings.model, settings), []
    for row in found["rows"]:
        if row["step_ms"] is None:
            continue
        shards = spread_evenly(row["tokens"], row["degree"], 0, settings.num_gpus)
        predicted = step_ms(model, found["num_layers"], [(0, shards)])
        lines.append(line("d", f"{row['server']}, {row['tokens']} tokens, degree {row['degree']}", row["step_ms"], predicted, "ms"))
    return lines


def of_serving(found: dict[str, Any], settings: Settings) -> list[dict[str, Any]]:
    """Closed population: the placements that were served. Open arrivals: the mean load of the run, spread evenly."""
    model, lines, n = cost_model(settings.model, settings), [], settings.num_gpus
    for entry in found.get("closed", []):
        placements = [(home, [(rank, count) for rank, count in shards]) for home, shards in entry["placements"]]
        if placements:
            predicted = step_ms(model, found["num_layers"], placements)
            lines.append(line("e1", f"{entry['server']}, {entry['population']}", entry["step_ms"], predicted, "ms"))
    for entry in found.get("open", []):
        if not entry["mean_tpot_ms"]:
            continue
        running = max(n, round(entry["concurrency"]))
        tokens = round(entry["mean_tokens"])
        placements = [(i % n, [(i % n, tokens)]) for i in range(running)]
        predicted = step_ms(model, found["num_layers"], placements)
        lines.append(line("e2", f"{entry['server']}, {entry['rate']:g} requests/s", entry["mean_tpot_ms"], predicted, "ms"))
    return lines
