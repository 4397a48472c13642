"""Several runs as one result, with the ratios that the project's bars name.

    python -m benchmark.headline.summary RUN/headline.json... --output benchmark/results/headline.json [--note TEXT]

Runs with as many GPUs and the same prefill are one part; its points must have been measured under equal facts, each once. The part of two
GPUs without prefill stands at the top as ever, others under `four_gpus`, `two_gpus_real_prefill` and so on, each with its own `cases`.

Limits on P99 TPOT: LIMITS_MS, and 1.5 x a loaded step without long prompts: the lowest P50 TPOT of any contender at the highest rate
measured at 0 % long, where the runs have that mix.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmark.headline.contenders import NO_PREFILL, REAL_PREFILL
from benchmark.headline.judge import Point, highest_rate, holds, ratios
from benchmark.headline.predict import COMMAND

LIMITS_MS = (20.0, 22.5, 25.0, 30.0, 40.0, 60.0)
MAIN_LIMIT_MS = 25.0
"""Where no mix without long prompts was measured."""
SHORT_STEPS = 1.5
NAMES = {1: "one_gpu", 2: "two_gpus", 4: "four_gpus", 8: "eight_gpus"}
EQUAL = ("machine", "model", "layers", "pool_tokens", "longest", "longest_output", "prefill")
SPLIT = Path(__file__).resolve().parents[1] / "results" / "split.json"

Case = dict[str, Any]
"""Contender -> {"points": [...], ...}."""


def points_by_contender(case: Mapping[str, Any]) -> dict[str, list[Point]]:
    return {name: found["points"] for name, found in case.items() if found["points"]}


def part_name(run: Mapping[str, Any]) -> str:
    prefill = run.get("prefill", NO_PREFILL)
    return NAMES[int(run["machine"].split(" x ")[0])] + ("" if prefill == NO_PREFILL else f"_{prefill}_prefill")


def _facts(run: Mapping[str, Any]) -> dict[str, Any]:
    """What the runs of one part have in common; None where a run, made before there was such a fact, does not say."""
    return {**{key: run.get(key) for key in EQUAL}, "prefill": run.get("prefill", NO_PREFILL)}


def merge(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Facts and cases of one part. ValueError where facts differ, or a point is there twice. Each point has the commit that it ran at
    where runs have several."""
    facts = _facts(runs[0])
    commits = list(dict.fromkeys(run["commit"] for run in runs))
    cases: dict[str, Case] = {}
    for run in runs:
        for key, value in _facts(run).items():
            if value != facts[key]:
                raise ValueError(f"{key}: {facts[key]!r} and {value!r} in runs of one part")
        for case_name, case in run["cases"].items():
            for name, found in case.items():
                into = cases.setdefault(case_name, {}).setdefault(name, {**found, "points": []})
                known = {point["requests_per_s"] for point in into["points"]}
                for point in found["points"]:
                    if point["requests_per_s"] in known:
                        raise ValueError(f"{case_name}, {name}, {point['requests_per_s']:g} requests/s: measured in two of the runs")
                    into["points"].append(point if len(commits) == 1 else {**point, "commit": run["commit"]})
                into["points"].sort(key=lambda point: point["requests_per_s"])
    for case_name, case in cases.items():
        windows = {(point.get("seconds"), point.get("history_ms")) for points in points_by_contender(case).values() for point in points}
        if len(windows) > 1:
            raise ValueError(f"{case_name}: points of different windows, (seconds, history_ms) {', '.join(map(str, windows))}")
    commands = [command for run in runs for command in (*run.get("earlier_commands", []), run["command"])]
    return {"command": "; ".join(dict.fromkeys(commands)), "commit": ", ".join(commits), **facts, "cases": cases}


def short_step(cases: Mapping[str, Case]) -> dict[str, Any] | None:
    """{"ms", "case", "contender", "requests_per_s"} of a loaded step without long prompts; None where none was measured."""
    found = [
        (-point["requests_per_s"], point["p50_tpot_ms"], case_name, name)
        for case_name, case in cases.items()
        if case_name.split("|")[0] == "0"
        for name, points in points_by_contender(case).items()
        for point in points
        if not point["failed"]
    ]
    if not found:
        return None
    rate, milliseconds, case_name, name = min(found)
    return {"ms": milliseconds, "case": case_name, "contender": name, "requests_per_s": -rate}


def is_bisected(points: Sequence[Point], limit_ms: float) -> bool:
    """A rate that is held, and a higher one that is not: the highest rate lies between."""
    held = [point["requests_per_s"] for point in points if holds(point, limit_ms)]
    return bool(held) and any(not holds(point, limit_ms) and point["requests_per_s"] > min(held) for point in points)


def lowest_ratios(case_name: str, case: Mapping[str, Any], limits_ms: Sequence[float]) -> list[dict[str, Any]]:
    """Ours against the best of all others: of the highest rates at each limit where both were bisected; where that is none, of the best
    other's P99 TPOT over ours at each rate that both were measured at."""
    points = points_by_contender(case)
    ours = points.get("ours", [])
    others = {name: found for name, found in points.items() if not name.startswith("ours")}
    if not ours or not others:
        return []
    found = []
    for limit in limits_ms:
        rate, against = max((highest_rate(theirs, limit), name) for name, theirs in others.items())
        if is_bisected(ours, limit) and is_bisected(others[against], limit):
            how = f"highest rate at {limit:g} ms"
            found.append({"ratio": round(highest_rate(ours, limit) / rate, 3), "case": case_name, "against": against, "how": how})
    if found:
        return found
    for mine in ours:
        same = [(point["p99_tpot_ms"], name) for name, theirs in others.items() for point in theirs if _is_equal(point, mine)]
        if same and not mine["failed"]:
            best, against = min(same)
            how = f"P99 TPOT at {mine['requests_per_s']:g} requests/s"
            found.append({"ratio": round(best / mine["p99_tpot_ms"], 3), "case": case_name, "against": against, "how": how})
    return found


def _is_equal(point: Point, mine: Point) -> bool:
    return point["requests_per_s"] == mine["requests_per_s"] and not point["failed"]


def judge_part(part: dict[str, Any]) -> dict[str, Any]:
    """`by_case`: at each limit, rates and ratios; the main case's at the main limit stand at the top, as its `by_limit`. Stock's P99 over
    ours is at the highest rate that stock holds, so at the top it is of the widest limit, `p99_limit_ms`."""
    step = short_step(part["cases"])
    main = MAIN_LIMIT_MS if step is None else round(SHORT_STEPS * step["ms"], 1)
    limits = sorted({*LIMITS_MS, main})
    by_case = {name: {f"{limit:g}": ratios(points_by_contender(case), limit) for limit in limits} for name, case in part["cases"].items()}
    lowest = [found for name, case in part["cases"].items() for found in lowest_ratios(name, case, limits)]
    judged: dict[str, Any] = {"short_step": step, "by_case": by_case, "lowest_by_case": _lowest_by_case(lowest)}
    if (name := main_case(part["cases"], main)) is not None:
        widest = {key: found for key, found in by_case[name][f"{limits[-1]:g}"].items() if key.startswith("p99_")}
        judged = by_case[name][f"{main:g}"] | widest | {"p99_limit_ms": limits[-1], "case": name, "by_limit": by_case[name]} | judged
    return judged


def _lowest_by_case(lowest: Sequence[dict[str, Any]]) -> dict[str, Any]:
    cases = dict.fromkeys(one["case"] for one in lowest)
    return {case: min((one for one in lowest if one["case"] == case), key=lambda one: one["ratio"]) for case in cases}


def main_case(cases: Mapping[str, Case], limit_ms: float) -> str | None:
    """3 % long prompts where that was measured for ours; of the seeds the one with most contenders, then with most that hold a measured
    rate at the limit, so that there is a ratio to all of them, then the lowest. Else the first case with ours."""

    def rank(name: str) -> tuple[bool, int, int, float]:
        points, seed = points_by_contender(cases[name]), float(name.split("|")[1])
        return name.startswith("0.03|"), len(points), sum(highest_rate(found, limit_ms) > 0 for found in points.values()), -seed

    return max((name for name, case in cases.items() if "ours" in points_by_contender(case)), key=rank, default=None)


def summarise(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The whole result. ValueError without a run of two GPUs without prefill."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for run in runs:
        groups.setdefault(part_name(run), []).append(run)
    if NAMES[2] not in groups:
        raise ValueError(f"the runs are of {', '.join(groups)}; the result needs one of {NAMES[2]}")
    parts = {name: merge(some) for name, some in groups.items()}
    judged = {name: judge_part(part) for name, part in parts.items()}
    top = parts.pop(NAMES[2])
    result = {key: value for key, value in top.items() if key != "cases"} | {NAMES[2]: judged[NAMES[2]]}
    result |= {name: judged[name] | part for name, part in parts.items()}
    lowest = [{**one, "part": name} for name, some in judged.items() for one in some["lowest_by_case"].values()]
    if lowest:
        least = min(lowest, key=lambda one: one["ratio"])
        result |= {"lowest_ratio_any_mix": least["ratio"], "lowest_ratio_is": least}
    split = json.loads(SPLIT.read_text())
    result["long_row_ratio"] = split["gqa"]["32/4 x 128"]["long_row_ratio"]["shares 2"]
    return result | {"cases": top["cases"]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--note", action="append", default=[], help="what a reader must know, a line of the page")
    args = parser.parse_args()
    runs = [json.loads(path.read_text()) for path in args.runs]
    for path, run in zip(args.runs, runs, strict=True):
        if run.get("prefill") != REAL_PREFILL and "predictions" not in run:
            parser.error(f"{path} has no predictions: {COMMAND}")
    result = summarise(runs) | {"notes": args.note, "predictions": COMMAND}
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: result.get(key) for key in ("lowest_ratio_any_mix", "lowest_ratio_is")}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
