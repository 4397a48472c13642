"""docs/results/headline.md: what it gains on real GPUs, measured."""

from __future__ import annotations

from typing import Any

from benchmark.headline.judge import ratios
from benchmark.headline.predict import as_measured
from scripts.result_pages.markdown import load, page, source, table

HEADINGS = ["server", "requests/s", "P50 TPOT, ms", "simulated", "P99 TPOT, ms", "simulated", "KV max over mean", "degrees", "simulated"]
RATIOS = ("rate_over_stock", "rate_over_whole", "p99_over_stock")
LIMIT_HEADINGS = ["limit, ms", "stock", "whole", "ours", *(f"`{name}`" for name in RATIOS), "`rate_over_whole` simulated"]


def render() -> str:
    result, split = load("headline.json"), load("split.json")
    points, again = next(iter(result["cases"].values())), result["second_seed"]
    return page(
        "What it gains, measured",
        source("headline.json", result),
        "\n".join(f"- {note}" for note in result["notes"]),
        "![P99 TPOT over the request rate](../figures/headline.png)",
        "*Simulated*: the same arrivals through the [simulator](../simulation.md), by a server's constants ([prices](prices.md)).",
        table(HEADINGS, _points(points)),
        "Highest rate under a limit on P99 TPOT, requests/s, interpolated, and ours over the others:",
        table(LIMIT_HEADINGS, _limits(result["two_gpus"]["by_limit"], points)),
        "## Another seed, and no long prompts",
        source("headline.json", again),
        "\n".join(f"- {note}" for note in again["notes"]),
        *(part for case, found in again["cases"].items() for part in (_mix(case), table(HEADINGS, _points(found)))),
        "## A long row beside many",
        source("split.json", split),
        "One layer of a captured decode, microseconds: a row of 300,000 tokens, 128 of 1,000, both together, and both over their sum.",
        table(["heads / KV heads", "split", "long row alone", "others alone", "together", "ratio"], _split(split)),
    )


def _points(cases: dict[str, Any]) -> list[tuple[Any, ...]]:
    rows = []
    for name, case in cases.items():
        for found in case["points"]:
            simulated = found.get("predicted", {})
            times = [f"{side[key]:.1f}" if side else "" for key in ("p50_tpot_ms", "p99_tpot_ms") for side in (found, simulated)]
            balance, degrees = f"{found['kv_max_over_mean']:.2f}", [_degrees(side.get("degrees", {})) for side in (found, simulated)]
            rows.append((f"`{name}`", f"{found['requests_per_s']:g}", *times, balance, *degrees))
    return rows


def _mix(case: str) -> str:
    """Of a key of `cases`, "share|seed"."""
    share, seed = case.split("|")
    return f"{100 * float(share):g} % long prompts, seed {seed}:"


def _degrees(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} at {degree}" for degree, count in counts.items())


def _limits(limits: dict[str, Any], cases: dict[str, Any]) -> list[tuple[Any, ...]]:
    predicted = {name: as_measured(case["points"]) for name, case in cases.items()}
    rows = []
    for limit, found in limits.items():
        rates = (f"{found['rates'][name]:.1f}" for name in ("stock", "whole", "ours"))
        simulated = ratios(predicted, float(limit)).get("rate_over_whole")
        rows.append((limit, *rates, *(found.get(name) for name in RATIOS), simulated))
    return rows


def _split(result: dict[str, Any]) -> list[tuple[Any, ...]]:
    rows = []
    for shape, case in result["gqa"].items():
        for name, key in (("FlashInfer's", "stock"), ("ours", "shares 2")):
            times = [case["us"][which][key] for which in ("1 rows, 300000", "128 rows, 0", "129 rows, 300000")]
            rows.append((shape, name, *(round(time) for time in times), case["long_row_ratio"][key]))
    return rows
