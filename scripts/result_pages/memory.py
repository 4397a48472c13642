"""docs/results/memory.md: retained conversations, and FP8 K/V."""

from __future__ import annotations

import statistics
from typing import Any

from scripts.result_pages.markdown import load, notes, page, source, table

KERNELS = (("default_attention", "`fa3`"), ("attention", "`flashinfer`"), ("latent_attention", "`flashmla`"))


def render() -> str:
    conversations, fp8 = load("conversations.json"), load("fp8.json")
    return page(
        "Conversations and FP8 K/V, measured",
        "## Retained conversations",
        *(source("conversations.json", run) for run in _runs(conversations)),
        "Seconds to the first token. Turns: of a prompt of 100,000 tokens, and of the same and 2,000 more. Loop: the median of twelve "
        "conversations at once, without and with retained sequences. Idle step: one in which nobody is sharded, with over without.",
        table(
            ["run", "first and second turn, ratio", "loop, ratio", "later turns alone", "prompts found in the loop", "idle step"],
            [_turns(run) for run in _runs(conversations)],
        ),
        notes(conversations["notes"]),
        "## FP8 K/V",
        source("fp8.json", fp8),
        notes(fp8["notes"]),
        "One layer of a captured decode of 32 rows of 131,072 tokens, median microseconds:",
        table(["kernel, model or heads", "bfloat16", "FP8", "ratio"], [row for key, name in KERNELS for row in _attention(name, fp8[key])]),
        "Mean difference of log-probabilities from stock SGLang with the same settings and one large pool, per stage:",
        _answers(fp8["answers"]["mean_difference_from_stock"]),
        "Step in which nobody is sharded (bfloat16), over stock with its own default kernels (`fa3`): median time per token of a loaded "
        "server of 48 layers without long prompts ([headline](headline.md)), by seed, and steps of 12 layers.",
        table(
            ["", "stock, ms", "with `--enable-dyncp`, ms", "ratio", "95 % interval"],
            [*_served(fp8["unsharded_served"]), _unsharded(fp8["unsharded"])],
        ),
    )


def _runs(conversations: dict[str, Any]) -> list[dict[str, Any]]:
    return [conversations, conversations["loop_of_five_turns"], conversations["earlier"]]


def _turns(run: dict[str, Any]) -> tuple[Any, ...]:
    """A run in a line: of seconds, with retained sequences beside those without."""
    on, off = run["servers"]["on"], run["servers"]["off"]
    both = [server["closed_loop"] for server in (off, on)]
    turns = None
    if "second_turn" in on:
        turns = f"{_pair(on['second_turn']['ttft_s'])}: {run['ttft_second_over_first']}"
    loop = f"{_pair([found['ttft_median_s'] for found in both])}: {run['ttft_median_over_off']}"
    name = f"{run['machine'].replace('NVIDIA ', '')}, {both[0]['turns']} turns"
    return name, turns, loop, run["ttft_later_median_over_off"], _pair([found["hit_share"] for found in both]), run.get("idle_step_ratio")


def _pair(values: list[float]) -> str:
    return ", ".join(f"{value:.2f}" for value in values)


def _attention(kernel: str, shapes: dict[str, Any]) -> list[tuple[Any, ...]]:
    rows = []
    for name, found in shapes.items():
        medians = (round(statistics.median(times)) for times in found["us"].values())
        rows.append((f"{kernel}, {name}", *medians, found["ratio"]))
    return rows


def _answers(cases: dict[str, dict[str, float]]) -> str:
    stages = next(iter(cases.values()))
    return table(["case", *stages], [(f"`{case}`", *found.values()) for case, found in cases.items()])


def _served(found: dict[str, Any]) -> list[tuple[Any, ...]]:
    times = [(one["seed"], one["stock_p50_tpot_ms"], one["ours_p50_tpot_ms"], one["ratio"]) for one in found["seeds"]]
    return [(f"seed {seed}", f"{stock:.2f}", f"{ours:.2f}", ratio, "") for seed, stock, ours, ratio in times]


def _unsharded(found: dict[str, Any]) -> tuple[Any, ...]:
    stock, ours = found["step_ms"]["stock_s0"], found["step_ms"]["graph_s0"]
    interval = f"{ours['low']:.2f} to {ours['high']:.2f}"
    return f"{found['layers']} layers", f"{stock['median_ms']:.2f}", f"{ours['median_ms']:.2f}", ours["ratio"], interval
