"""Part (b): answers of degrees 1 to N against stock SGLang with one large pool."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmark.multi_gpu.servers import GpuServer, ServerRefused, serving
from benchmark.multi_gpu.settings import ROOT, PartFailed, Settings

import random_models  # isort: skip - found through benchmark.multi_gpu.servers
from runtime_check import NEW_TOKENS, SIZES, ask, differences, pinned, prompt, summary, within_bounds  # isort: skip


def run(settings: Settings, figures: dict[str, Any], save: Callable[[], None]) -> None:
    settings.require_servers()
    wrong = []
    for name in ("gqa",) if settings.dry else ("gqa", "mla"):
        flags = ("--flashinfer-mla-disable-ragged",) if name == "mla" else ()
        path, pool, n = model_path(name, settings), SIZES[settings.device].pool, settings.num_gpus
        stock = GpuServer(f"b_{name}_stock", path, 1, 4 * pool, False, flags, device=settings.device)
        ours = GpuServer(f"b_{name}", path, n, pool, True, flags, device=settings.device)
        prompts = [prompt(length, seed) for seed, length in enumerate(SIZES[settings.device].lengths)]
        try:
            with serving(settings, stock):
                expected = [ask(stock, ids, NEW_TOKENS, None) for ids in prompts]
            with serving(settings, ours):
                rows = compare_degrees(ours, prompts, expected, name)
        except ServerRefused as error:
            raise PartFailed(str(error)) from error
        figures["rows"] += rows
        save()
        wrong += [f"{name} degree {row['degree']}" for row in rows if not row["equal"]]
    if wrong:
        raise PartFailed(f"answers differ from stock: {', '.join(wrong)}")


def compare_degrees(ours: GpuServer, prompts: Sequence[list[int]], expected: Sequence[Any], name: str) -> list[dict[str, Any]]:
    """Degree 1 is SGLang's own path: how far it is from stock is the measure for the others (runtime_check.BOUNDS)."""
    rows, base = [], None
    for degree in range(1, ours.instances + 1):
        pins = [pinned(degree, index % ours.instances) for index in range(len(prompts))]
        with ThreadPoolExecutor(3) as pool:
            answers = list(pool.map(lambda ids, pin: ask(ours, ids, NEW_TOKENS, pin), prompts, pins))
        found = summary([differences(stock, answer) for stock, answer in zip(expected, answers, strict=True)])
        base = found if base is None else base
        pinned_as_asked = set(found["degrees"]) == {degree}
        rows.append(
            {
                "model": name,
                "degree": degree,
                "equal": within_bounds(found, base) and pinned_as_asked,
                "prompts": len(prompts),
                "compared_tokens": found["all"]["count"],
                "parted": len(found["parted"]),
                "parted_without_tie": found["parted_without_tie"],
                "mean_difference": round(found["all"]["mean"], 6),
                "p99_difference": round(found["all"]["p99"], 6),
            }
        )
    return rows


def model_path(name: str, settings: Settings) -> Path:
    if settings.dry:
        return ROOT / "test" / "models" / "qwen3moe"
    experts, key = max(4, settings.num_gpus), "num_experts" if name == "gqa" else "n_routed_experts"
    # At least one expert per instance, and still all of them for every token.
    random_models.MODELS[name] = random_models.MODELS[name] | {key: experts, "num_experts_per_tok": experts}
    return random_models.write_model(name, settings.work / "models")
