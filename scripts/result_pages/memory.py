"""docs/results/memory.md: retained conversations, and FP8 K/V."""

from __future__ import annotations

import statistics
from typing import Any

from scripts.result_pages.markdown import load, page, source, table


def render() -> str:
    conversations, fp8 = load("conversations.json"), load("fp8.json")
    return page(
        "Conversations and FP8 K/V, measured",
        "## Retained conversations",
        source("conversations.json", conversations),
        _notes(conversations),
        "Seconds to the first token, by `--dyncp-cache-fraction`: a prompt of 100,000 tokens, the same and 2,000 more, a closed loop of "
        "twelve conversations.",
        table(["server", "first turn", "second turn", "median of the loop", "hit share of the loop"], _turns(conversations["servers"])),
        "## FP8 K/V",
        source("fp8.json", fp8),
        _notes(fp8),
        "One layer of a captured decode of 32 rows of 131,072 tokens, median microseconds:",
        table(["heads / KV heads", "bfloat16", "FP8", "ratio"], _attention(fp8["attention"])),
        "Mean difference of log-probabilities from stock SGLang with the same settings and one large pool, per stage:",
        _answers(fp8["answers"]["mean_difference_from_stock"]),
        "Step in which nobody is sharded, over stock with its own default kernels (`fa3`):",
        table(["stock, ms", "with `--enable-dyncp`, ms", "ratio", "95 % interval", "same kernels"], [_unsharded(fp8["unsharded"])]),
    )


def _notes(result: dict[str, Any]) -> str:
    return "\n".join(f"- {note}" for note in result["notes"])


def _turns(servers: dict[str, Any]) -> list[tuple[Any, ...]]:
    rows = []
    for name, found in servers.items():
        first, second = (f"{seconds:.2f}" for seconds in found["second_turn"]["ttft_s"])
        loop = found["closed_loop"]
        rows.append((name, first, second, f"{loop['ttft_median_s']:.2f}", f"{loop['hit_share']:.2f}"))
    return rows


def _attention(shapes: dict[str, Any]) -> list[tuple[Any, ...]]:
    rows = []
    for name, found in shapes.items():
        medians = (round(statistics.median(times)) for times in found["us"].values())
        rows.append((name, *medians, found["ratio"]))
    return rows


def _answers(cases: dict[str, dict[str, float]]) -> str:
    stages = next(iter(cases.values()))
    return table(["case", *stages], [(f"`{case}`", *found.values()) for case, found in cases.items()])


def _unsharded(found: dict[str, Any]) -> tuple[Any, ...]:
    stock, ours = found["step_ms"]["stock_s0"], found["step_ms"]["graph_s0"]
    interval = f"{ours['low']:.2f} to {ours['high']:.2f}"
    return f"{stock['median_ms']:.2f}", f"{ours['median_ms']:.2f}", ours["ratio"], interval, "yes" if found["same_kernels"] else "no"
