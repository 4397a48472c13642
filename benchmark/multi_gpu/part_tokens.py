"""Part (b): answers of degrees 1 to N against stock SGLang with one large pool."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from benchmark.multi_gpu.report import FAILURES
from benchmark.multi_gpu.server_pool import STOCK, SYNTHETIC, ServerPool, settled_counts
from benchmark.multi_gpu.servers import GpuServer
from benchmark.multi_gpu.settings import PartFailed, Settings
from testing.gpu.answers import ask, differences, pinned, prompt, summary
from testing.gpu.runtime_cases import NEW_TOKENS, PAGE_SIZE, SIZES, within_bounds

AT_ONCE = 3


def run(settings: Settings, figures: dict[str, Any], save: Callable[[], None]) -> None:
    pool = settings.require_servers()
    models = ("gqa",) if settings.dry else ("gqa", "mla")
    names = [f"b_{model}{kind}" for model in models for kind in ("_stock", "")]
    wrong = []
    try:
        pool.settle(*names)
        if {"d", "e"} & set(settings.letters):
            pool.start(STOCK, SYNTHETIC)  # nothing is timed here, so the next servers may start meanwhile
        for model in models:
            try:
                rows = compare_model(pool, model, settings)
            except FAILURES as error:
                wrong.append(f"{model}: {type(error).__name__}: {error}"[:1500])
                continue
            figures["rows"] += rows
            save()
            wrong += [f"{model} degree {row['degree']}: answers differ from stock" for row in rows if not row["equal"]]
    finally:
        pool.stop(*names)
    if wrong:
        raise PartFailed("; ".join(wrong))


def compare_model(pool: ServerPool, model: str, settings: Settings) -> list[dict[str, Any]]:
    prompts = prompts_for_all(settings)
    with pool.using(f"b_{model}_stock") as stock:
        expected = ask_all(stock, prompts, [None] * len(prompts))
    with pool.using(f"b_{model}") as ours:
        return compare_degrees(ours, prompts, expected, model)


def prompts_for_all(settings: Settings) -> list[list[int]]:
    """The runtime check's prompts that have a page for every shard."""
    least = settings.num_gpus * PAGE_SIZE
    return [prompt(length, seed) for seed, length in enumerate(SIZES[settings.device].lengths) if length >= least]


def ask_all(server: GpuServer, prompts: Sequence[list[int]], pins: Sequence[dict[str, Any] | None]) -> list[Any]:
    """Some at a time. On an error (or the part's time limit) the rest is left to end with its server."""
    executor = ThreadPoolExecutor(AT_ONCE)
    try:
        return list(executor.map(lambda ids, pin: ask(server, ids, NEW_TOKENS, pin), prompts, pins))
    finally:
        executor.shutdown(wait=False, cancel_futures=True)


def compare_degrees(ours: GpuServer, prompts: Sequence[list[int]], expected: Sequence[Any], name: str) -> list[dict[str, Any]]:
    """Degree 1 is SGLang's own path: how far it is from stock is the measure for the others (runtime_cases.BOUNDS)."""
    rows, base = [], None
    for degree in range(1, ours.instances + 1):
        before = settled_counts(ours)
        pins = [pinned(degree, index % ours.instances) for index in range(len(prompts))]
        answers = ask_all(ours, prompts, pins)
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
                "sharded_graph_steps": settled_counts(ours)["sharded_graph"] - before["sharded_graph"],
            }
        )
    return rows
