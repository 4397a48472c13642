"""Part (d): one long request alone, decoded at every degree that is a power of two, and by stock SGLang."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from benchmark.multi_gpu.predictions import predicted_step_ms
from benchmark.multi_gpu.report import FAILURES
from benchmark.multi_gpu.server_pool import DRY_POOL, SERVED_POOL, STOCK, SYNTHETIC, cost_model_notes, settled_counts
from benchmark.multi_gpu.servers import GpuServer
from benchmark.multi_gpu.settings import PartFailed, Settings
from benchmark.multi_gpu.streams import Streamed, stream
from testing.gpu.answers import pinned, prompt

LENGTHS = (65_536, 262_144, 1_048_576)
LONGEST_REAL_PREFILL = 262_144
"""With few layers this takes a quarter of a minute; a million tokens take minutes."""
DRY_LENGTHS = (256, 512)
NEW_TOKENS, FIRST_GAPS = 160, 8
"""FIRST_GAPS: left out; the first steps of a request copy its page list."""


def run(settings: Settings, figures: dict[str, Any], save: Callable[[], None]) -> None:
    pool = settings.require_servers()
    figures |= {"num_layers": 2 if settings.dry else settings.num_layers, "synthetic_prefill": True, "new_tokens": NEW_TOKENS}
    pool.settle(STOCK, SYNTHETIC)
    problems = []
    # Ours first: what stock needs for its real prefill is spent last.
    for name in (SYNTHETIC, STOCK):
        try:
            with pool.using(name) as server:
                figures.setdefault("notes", {}).update(cost_model_notes(server, name))
                problems += measure(server, name, settings, figures, save)
        except FAILURES as error:
            problems.append(f"{name}: {type(error).__name__}: {error}"[:1500])
    if problems:
        raise PartFailed("; ".join(problems))


def cases(settings: Settings, name: str) -> list[tuple[int, int]]:
    """(tokens, degree), the shortest first."""
    degrees = [degree for degree in range(1, settings.num_gpus + 1) if degree & (degree - 1) == 0] if name == SYNTHETIC else [1]
    return [(length, degree) for length in (DRY_LENGTHS if settings.dry else LENGTHS) for degree in degrees]


def measure(server: GpuServer, name: str, settings: Settings, figures: dict[str, Any], save: Callable[[], None]) -> list[str]:
    """What went wrong, case by case; the first error of a server that is gone ends it."""
    problems = []
    longest = None if name == SYNTHETIC else DRY_POOL if settings.dry else SERVED_POOL
    for seed, (length, degree) in enumerate(cases(settings, name)):
        entry: dict[str, Any] = {"server": name, "tokens": length, "degree": degree, "step_ms": None, "mean_ms": None, "p90_ms": None}
        entry |= {"predicted_ms": predicted_step_ms(settings, figures["num_layers"], length, degree), "prefill_s": None}
        entry |= {"graph_steps": None, "sharded_graph_steps": None, "eager_steps": None, "reason": None}
        figures["rows"].append(entry)
        if longest is not None and length > min(longest, LONGEST_REAL_PREFILL):
            entry["reason"] = "needs a synthetic prefill"
            continue
        try:
            entry |= measure_case(server, name, length, degree, seed)
        except FAILURES as error:
            entry["reason"] = f"{type(error).__name__}: {error}"[:600]
            problems.append(f"{name}, {length} tokens, degree {degree}: {entry['reason']}")
        save()
        if not server.alive:
            return [*problems, f"server {name} has ended"]
    return problems


def measure_case(server: GpuServer, name: str, length: int, degree: int, seed: int) -> dict[str, Any]:
    ours = name == SYNTHETIC
    server.client.flush_cache()
    before = settled_counts(server) if ours else {}
    answer = stream(server.client, prompt(length, 7 + seed), NEW_TOKENS, pinned(degree, 0) if ours else {})
    found = step_times(answer) | {"prefill_s": round(answer.first_token_s, 3)}
    if ours:
        after = settled_counts(server)
        found |= {f"{kind}_steps": after[kind] - before[kind] for kind in ("graph", "sharded_graph", "eager")}
        served = (answer.meta.get("dyncp") or {"degree_end": 1})["degree_end"]
        if served != degree:
            raise PartFailed(f"{length} tokens pinned to degree {degree} were served at {served}")
    return found


def step_times(answer: Streamed) -> dict[str, float]:
    """step_ms: median time between two chunks, per token. mean_ms: all time over all tokens, which late or joined chunks do not change."""
    gaps = sorted(answer.gaps()[FIRST_GAPS:])
    tokens_per_chunk = (answer.tokens - 1) / max(1, len(answer.times) - 1)
    steps = len(gaps) * tokens_per_chunk
    return {
        "step_ms": round(statistics.median(gaps) / tokens_per_chunk * 1000, 4),
        "mean_ms": round(sum(gaps) / steps * 1000, 4),
        "p90_ms": round(gaps[int(0.9 * len(gaps))] / tokens_per_chunk * 1000, 4),
    }
