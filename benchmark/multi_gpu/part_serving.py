"""Part (e): stock SGLang's data parallelism against dyncp, on the same GPUs, with the same requests."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from benchmark.multi_gpu.open_arrivals import search_rate
from benchmark.multi_gpu.report import FAILURES
from benchmark.multi_gpu.server_pool import DYNCP, STOCK, SYNTHETIC, cost_model_notes, settled_counts
from benchmark.multi_gpu.servers import GpuServer
from benchmark.multi_gpu.settings import PartFailed, Settings
from benchmark.multi_gpu.streams import decode_window, placement, stream_all
from benchmark.multi_gpu.trace import trace_lengths
from testing.gpu.answers import prompt

PER_INSTANCE = 16
LONG_TOKENS = 262_144
RESERVE_S = 4.0
DECODE_TOKENS, LEAST_TOKENS = 400, 50


def populations(settings: Settings) -> dict[str, list[int]]:
    """Prompt lengths: the trace as it is; and short prompts with one very long one among them."""
    count = settings.num_gpus * (2 if settings.dry else PER_INSTANCE)
    longest, short = (600, 64) if settings.dry else (LONG_TOKENS, 2048)
    return {
        "trace": [prompt for prompt, _ in trace_lengths(count, 400 if settings.dry else 131_072)],
        "one long": [longest, *[short] * (count - 1)],
    }


def run(settings: Settings, figures: dict[str, Any], save: Callable[[], None]) -> None:
    pool = settings.require_servers()
    figures |= {"num_layers": 2 if settings.dry else settings.num_layers, "closed": [], "open": [], "tpot_ms": settings.tpot_ms}
    figures["notes"] = {"model": f"layers of {settings.model}, {figures['num_layers']} of them, random weights"}
    end = time.monotonic() + settings.limit_s("e")
    pool.settle(STOCK, SYNTHETIC)
    problems: list[str] = []
    for name in (SYNTHETIC, STOCK):
        try:
            with pool.using(name) as server:
                figures["notes"] |= cost_model_notes(server, name)
                problems += closed_populations(server, name, settings, figures, save)
        except FAILURES as error:
            problems.append(f"e1, {name}: {type(error).__name__}: {error}"[:1500])
    # Arrivals need a real prefill, so ours is started anew; beside it there is no room for the other one.
    pool.stop(SYNTHETIC)
    pool.settle(DYNCP)
    seconds = (end - time.monotonic() - RESERVE_S) / 2
    for name in (DYNCP, STOCK):
        try:
            with pool.using(name) as server:
                figures["notes"] |= cost_model_notes(server, name)
                search_rate(server, name, settings, figures, save, seconds=seconds)
        except FAILURES as error:
            problems.append(f"e2, {name}: {type(error).__name__}: {error}"[:1500])
        seconds = end - time.monotonic() - RESERVE_S
    if problems:
        raise PartFailed("; ".join(problems))


def closed_populations(server: GpuServer, name: str, settings: Settings, figures: dict[str, Any], save: Callable[[], None]) -> list[str]:
    problems = []
    for population, lengths in populations(settings).items():
        try:
            closed(server, name, population, lengths, settings, figures)
        except FAILURES as error:
            problems.append(f"e1, {name}, {population}: {type(error).__name__}: {error}"[:800])
        save()
        if not server.alive:
            return [*problems, f"server {name} has ended"]
    return problems


def closed(server: GpuServer, name: str, population: str, lengths: list[int], settings: Settings, figures: dict[str, Any]) -> None:
    """(e1) All prompts are prefilled first; then the time in which all of them decode together is measured."""
    server.client.flush_cache()
    before = settled_counts(server) if name != STOCK else {}
    prompts = [prompt(length, 500 + index) for index, length in enumerate(lengths)]
    new_tokens, least = (120, 8) if settings.dry else (DECODE_TOKENS, LEAST_TOKENS)
    answers = stream_all(server.client, prompts, new_tokens)
    window = decode_window(answers, least_tokens=least)
    placements = [placement(answer) for answer in answers]
    figures["closed"].append({"server": name, "population": population, "placements": placements} | window)
    held = [0] * settings.num_gpus
    for _, shards in placements:
        for rank, tokens in shards:
            held[rank] += tokens
    balance = round(max(held) / (sum(held) / len(held)), 3)
    degrees = [len(shards) for _, shards in placements]
    row = {"what": "e1 closed", "server": name, "population": population, "requests": len(lengths), "tokens": sum(lengths)}
    row |= window | {"kv_max_over_mean": balance, "largest_degree": max(degrees)}
    row["prefill"] = "synthetic" if name == SYNTHETIC else "real"
    row["prefill_s"] = round(max(answer.times[0] for answer in answers) - min(answer.started for answer in answers), 2)
    after = settled_counts(server) if before else {}
    for kind in ("graph", "sharded_graph", "eager"):
        row[f"{kind}_steps"] = after[kind] - before[kind] if before else None
    figures["rows"].append(row)
