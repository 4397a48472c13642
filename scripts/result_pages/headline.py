"""docs/results/headline.md: what it gains on real GPUs, measured.

A headline.json has the cases of one machine and, where benchmark.headline.summary made it, `by_case` and further parts (`four_gpus`, ...).
"""

from __future__ import annotations

from typing import Any

from benchmark.headline.judge import LEAST_TOKENS, WARM_WINDOW_SHARE, rate_key, ratios
from benchmark.headline.predict import as_measured
from benchmark.headline.traffic import mix_title
from scripts.result_pages.markdown import load, notes, page, source, table

HEADINGS = ["server", "requests/s", "P50 TPOT, ms", "simulated", "P99 TPOT, ms", "simulated", "KV max over mean", "degrees", "simulated"]
RATIOS = ("rate_over_stock", "rate_over_whole", "p99_over_stock")
SIMULATED = "`rate_over_whole` simulated"
FIRST = ("stock", "whole", "ours")
EARLIER = "earlier"
"""Parts of the file whose names begin so are not shown."""
SPLIT_TEXT = "One layer of a captured decode, microseconds: a row of 300,000 tokens, 128 of 1,000, both together, and both over their sum."
LIMIT_TEXT = "Highest rate under a limit on P99 TPOT, requests/s, interpolated, and ours over the others:"

BOUNDED = ("whole", "ours", "`even`")
WAITS = ("wait, whole", "ours", "`even`")
BOUNDS_TEXT = (
    "Highest rate under the limit, requests/s, by the constants of an H200. `even`: sharded rows cost no time beyond their attention, and "
    "lie as ours do or over all instances, whichever is better. Two loads of a short window differ by more than the servers do; these are "
    "long windows of several loads."
)


def render() -> str:
    return render_of(load("headline.json"), load("split.json"), load("headline_bounds.json"))


def render_of(result: dict[str, Any], split: dict[str, Any], bounds: dict[str, Any]) -> str:
    judged = result["two_gpus"]
    main = judged.get("case", next(iter(result["cases"])))
    return page(
        "What it gains, measured",
        source("headline.json", result),
        *_notes(result),
        "![P99 TPOT over the request rate](../figures/headline.png)",
        "*Simulated*: the same arrivals through the [simulator](../simulation.md), by a server's constants ([prices](prices.md)).",
        *_windows(result["cases"][main]),
        *_graphs(result["cases"]),
        table(HEADINGS, _points(result["cases"][main])),
        LIMIT_TEXT,
        _limits(judged["by_limit"], result["cases"][main]),
        *_other_cases(result, main),
        "## What placement can gain at most, simulated",
        source("headline_bounds.json", bounds),
        BOUNDS_TEXT,
        table(["GPUs", "mix", "limit, ms", *BOUNDED, "ours over whole", "`even` over whole"], map(_bounded_rates, bounds["rates"])),
        "Coding agents' lengths: P99 TPOT in ms, whole's over that of the others, and P99 of the wait for room in s. At the last rates the "
        "pools are full: a step then takes what a full pool takes, and who packs them better waits less.",
        table(
            ["GPUs", "requests/s", *BOUNDED, "whole over ours", "whole over `even`", *WAITS], map(_bounded_latencies, bounds["latencies"])
        ),
        "## A long row beside many",
        source("split.json", split),
        SPLIT_TEXT,
        table(["heads / KV heads", "split", "long row alone", "others alone", "together", "ratio"], _split(split)),
    )


def _windows(case: dict[str, Any]) -> list[str]:
    """How the points were measured, of windows that began loaded; the points of a case have equal ones."""
    found = next(point for contender in case.values() for point in contender["points"])
    if "history_ms" not in found:
        return []
    return [
        f"Each point is a window of {found['seconds']:g} s, begun with the requests that would still run had others come long before, "
        f"aged by {found['history_ms']:g} ms a token, and cuts off what streams at its end. Times per token are of what lies behind its "
        f"first {100 * WARM_WINDOW_SHARE:g} %, of every request with {LEAST_TOKENS} tokens or more there."
    ]


def _graphs(cases: dict[str, Any]) -> list[str]:
    """The lowest share of graphs of any window, where it is known."""
    points = [point for case in cases.values() for contender in case.values() for point in contender["points"]]
    shares = [point["graph_share"] for point in points if point.get("graph_share") is not None]
    return [f"Of the decode steps that a server logged in a window, at least {100 * min(shares):g} % ran as graphs."] if shares else []


def _notes(result: dict[str, Any]) -> list[str]:
    return [notes(result["notes"])] if result.get("notes") else []


def _other_cases(result: dict[str, Any], main: str) -> list[str]:
    """Of a summary: the other cases, what is lowest, and the parts of other machines."""
    parts = ["## Other mixes and seeds"]
    parts += _cases(result["two_gpus"]["by_case"], {name: case for name, case in result["cases"].items() if name != main})
    further = {name: part for name, part in result.items() if isinstance(part, dict) and "cases" in part}
    shown = {name: part for name, part in further.items() if not name.startswith(EARLIER)}
    for name, part in shown.items():
        parts += [f"## {name.replace('_', ' ').capitalize()}", source("headline.json", part), *_notes(part)]
        parts += _cases(part["by_case"], part["cases"])
    judged = {"two_gpus": result["two_gpus"], **shown}
    if lowest := [_lowest(name, least) for name, part in judged.items() for least in part["lowest_by_case"].values()]:
        parts += [
            "## Where ours is least ahead",
            "Lowest of ours against the best other, of each case:",
            table(["mix", "where", "ratio", "against", "of"], lowest),
        ]
    if earlier := [f"`{name}`, at {part['commit']}" for name, part in further.items() if name.startswith(EARLIER)]:
        parts.append(f"Points of older commits stay in the file: {'; '.join(earlier)}.")
    return parts


def _lowest(part: str, least: dict[str, Any]) -> tuple[Any, ...]:
    return _mix(least["case"])[:-1], part.replace("_", " "), least["ratio"], f"`{least['against']}`", least["how"]


def _cases(by_case: dict[str, Any], cases: dict[str, Any]) -> list[str]:
    parts = []
    for name, case in cases.items():
        parts += [_mix(name), table(HEADINGS, _points(case)), _limits(by_case[name], case)]
    return parts


def _points(cases: dict[str, Any]) -> list[tuple[Any, ...]]:
    rows = []
    for name, case in cases.items():
        for found in case["points"]:
            simulated = found.get("predicted", {})
            times = [f"{side[key]:.1f}" if side else "" for key in ("p50_tpot_ms", "p99_tpot_ms") for side in (found, simulated)]
            balance = "" if found["kv_max_over_mean"] is None else f"{found['kv_max_over_mean']:.2f}"
            degrees = [_degrees(side.get("degrees", {})) for side in (found, simulated)]
            rows.append((f"`{name}`", f"{found['requests_per_s']:g}", *times, balance, *degrees))
    return rows


def _mix(case: str) -> str:
    """Of a key of `cases`, "mix|seed"."""
    mix, seed = case.split("|")
    return f"{mix_title(mix)}, seed {seed}:"


def _degrees(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} at {degree}" for degree, count in counts.items())


def _limits(limits: dict[str, Any], cases: dict[str, Any]) -> str:
    predicted = {name: as_measured(case["points"]) for name, case in cases.items()}
    measured = {name for found in limits.values() for name in found["rates"]}
    names = [name for name in FIRST if name in measured] + sorted(measured - {*FIRST})
    keys = [*RATIOS, *(key for name in names if (key := rate_key(name)) and key not in RATIOS)]
    keys = [key for key in keys if any(key in found for found in limits.values())]
    rows = []
    for limit, found in limits.items():
        rates = (f"{found['rates'][name]:.1f}" for name in names)
        simulated = ratios(predicted, float(limit)).get("rate_over_whole")
        rows.append((limit, *rates, *(_ratio(found, key) for key in keys), simulated))
    labels = [name if name in FIRST else f"`{name}`" for name in names]
    return table(["limit, ms", *labels, *(f"`{key}`" for key in keys), SIMULATED], rows)


def _ratio(found: dict[str, Any], key: str) -> Any:
    """Empty where there is none; with the rates that it is of where ours was measured at a higher one than stock."""
    rates = found.get("p99_at", {}) if key == "p99_over_stock" else {}
    if rates.get("ours") == rates.get("stock"):
        return found.get(key)
    return f"{found[key]} ({rates['stock']:g} against {rates['ours']:g} requests/s)"


def _bounded_rates(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["gpus"], mix_title(row["mix"]), row["limit_ms"], *row["rates"].values(), *row["over_whole"].values()


def _bounded_latencies(row: dict[str, Any]) -> tuple[Any, ...]:
    rate = f"{row['requests_per_s']:g}"
    return row["gpus"], rate, *row["p99_tpot_ms"].values(), *row["over_whole"].values(), *row["p99_wait_s"].values()


def _split(result: dict[str, Any]) -> list[tuple[Any, ...]]:
    rows = []
    for shape, case in result["gqa"].items():
        for name, key in (("FlashInfer's", "stock"), ("ours", "shares 2")):
            times = [case["us"][which][key] for which in ("1 rows, 300000", "128 rows, 0", "129 rows, 300000")]
            rows.append((shape, name, *(round(time) for time in times), case["long_row_ratio"][key]))
    return rows
