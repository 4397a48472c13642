"""Part (e): stock SGLang's data parallelism against dyncp, on the same GPUs, with the same requests."""

from __future__ import annotations

import csv
from collections.abc import Callable
from typing import Any

from benchmark.multi_gpu.open_arrivals import search_rate
from benchmark.multi_gpu.servers import GpuServer, ServerRefused, layered_server, serving
from benchmark.multi_gpu.settings import ROOT, PartFailed, Settings
from benchmark.multi_gpu.streams import decode_window, placement, stream_all

TRACE = ROOT / "test" / "data" / "mooncake_lengths.csv"
PER_INSTANCE = 16
LONG_TOKENS = 262_144
POOL_TOKENS = 700_000
DECODE_TOKENS, LEAST_TOKENS = 400, 50


def trace_lengths(count: int, longest: int) -> list[tuple[int, int]]:
    """(prompt, output) of the trace's first requests, scaled down only where the longest would not fit."""
    with TRACE.open() as lines:
        rows = list(csv.DictReader(line for line in lines if not line.startswith("#")))
    lengths = [(int(row["input_length"]), int(row["output_length"])) for row in rows]
    factor = min(1.0, longest / max(prompt for prompt, _ in lengths))
    return [(max(4, round(prompt * factor)), max(2, round(output * factor))) for prompt, output in lengths[:count]]


def populations(settings: Settings) -> dict[str, list[int]]:
    """Prompt lengths: the trace as it is; and short prompts with one very long one among them."""
    count = settings.num_gpus * (2 if settings.dry else PER_INSTANCE)
    longest, short = (600, 64) if settings.dry else (LONG_TOKENS, 2048)
    return {
        "trace": [prompt for prompt, _ in trace_lengths(count, 400 if settings.dry else 131_072)],
        "one long": [longest, *[short] * (count - 1)],
    }


def run(settings: Settings, figures: dict[str, Any], save: Callable[[], None]) -> None:
    settings.require_servers()
    figures |= {"num_layers": 2 if settings.dry else settings.num_layers, "closed": [], "open": [], "tpot_ms": settings.tpot_ms}
    figures["notes"] = {"model": f"layers of {settings.model}, {figures['num_layers']} of them, random weights"}
    for name, dyncp in (("stock", False), ("dyncp", True)):
        server = layered_server(settings, f"e_{name}", dyncp=dyncp, pool=1024 if settings.dry else POOL_TOKENS)
        try:
            with serving(settings, server):
                for population, lengths in populations(settings).items():
                    closed(server, name, population, lengths, settings, figures)
                    save()
                # A third of the part's time for each server's search, the rest for starts and the closed populations.
                search_rate(server, name, settings, figures, save, seconds=settings.limit_s("e") / 4)
        except ServerRefused as error:
            raise PartFailed(str(error)) from error


def closed(server: GpuServer, name: str, population: str, lengths: list[int], settings: Settings, figures: dict[str, Any]) -> None:
    """(e1) All prompts are prefilled first; then the time in which all of them decode together is measured."""
    from runtime_check import prompt

    server.client.flush_cache()
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
    figures["rows"].append(row | window | {"kv_max_over_mean": balance, "largest_degree": max(degrees)})
