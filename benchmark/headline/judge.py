"""What a run says: its point, whether a rate is held, the highest rate under a limit, and the ratios that the project's bars name. Pure."""

from __future__ import annotations

import math
import re
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from benchmark.headline.client import Served

WARM_SHARE = 0.1
"""The first arrivals load the cluster and are not measured."""
WARM_WINDOW_SHARE = 0.15
"""Of a window that begins loaded, this first part is not measured."""
LEAST_TOKENS = 32
"""A request with fewer in the measured part of a window says little of its time per token."""
SILENT_S = 2.0
SLOWEST = 3
"""Requests of a window that are named."""
MOST_TTFT_S = 10.0
"""A queue that grows shows here, not in TPOT."""

DECODE_LINE = re.compile(r"Decode batch.*cuda graph: (True|False)")

Point = dict[str, Any]


def percentile(values: Sequence[float], share: float) -> float:
    """Nearest rank; NaN of nothing."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else math.nan


def point(served: Sequence[Served], rate: float, balances: Sequence[float]) -> Point:
    """One rate of one contender. balances: KV tokens, maximum over mean of the instances, sampled while it ran."""
    measured = served[int(WARM_SHARE * len(served)) :]
    good = [one for one in measured if one.error is None]
    tpot = [one.tpot_ms for one in good if one.tpot_ms is not None]
    waits = [one.first_s - one.sent_s for one in good if one.first_s is not None]
    return _point(served, rate, tpot, waits, balances, good)


def window_point(served: Sequence[Served], rate: float, balances: Sequence[float], seconds: float) -> Point:
    """The same of a window of `seconds` that began loaded and cut off what had not ended.

    Times per token are of every request, begun or new, in the measured part alone. First tokens are those of new arrivals; who was sent
    in the measured part and had none when the window ended counts with the time that it had waited. Silent: streams that had
    begun and brought nothing in the last 2 s before they were cut off. Slowest: the requests that P99 is made of.
    """
    good = [one for one in served if one.error is None]
    start = WARM_WINDOW_SHARE * seconds
    timed = [(found, one) for one in good if (found := tpot_between(one, start, seconds)) is not None]
    tpot = [found for found, _ in timed]
    new = [one for one in good if not one.arrival.begun and start <= one.arrival.at_s]
    waits = [_end_of_wait(one, seconds) - one.sent_s for one in new]
    return _point(served, rate, tpot, waits, balances, good) | {
        "seconds": seconds,
        "measured": len(tpot),
        "begun": sum(one.arrival.begun for one in served),
        "cut_off": sum(one.cut for one in served),
        "silent": sum(one.cut and _last_event(one, seconds) < seconds - SILENT_S for one in served),
        "degrees_unknown": sum(one.degree is None for one in good),
        "slowest": [
            {"prompt": one.arrival.prompt_tokens, "tpot_ms": round(found, 3), "longest_gap_s": round(longest_gap(one, start, seconds), 3)}
            for found, one in sorted(timed, key=lambda pair: -pair[0])[:SLOWEST]
        ],
    }


def tpot_between(one: Served, start_s: float, end_s: float) -> float | None:
    """Mean ms per token between the first and the last event in start_s..end_s; None where fewer than LEAST_TOKENS came between them."""
    first, behind = bisect_left(one.event_s, start_s), bisect_right(one.event_s, end_s)
    if behind - first < 2:
        return None
    tokens = one.event_tokens[behind - 1] - one.event_tokens[first]
    return (one.event_s[behind - 1] - one.event_s[first]) / tokens * 1000 if tokens >= LEAST_TOKENS else None


def longest_gap(one: Served, start_s: float, end_s: float) -> float:
    """Longest time without an event in start_s..end_s of a stream that has some there [s]: it shows a request that sat out."""
    times = one.event_s[bisect_left(one.event_s, start_s) : bisect_right(one.event_s, end_s)] + [end_s] * one.cut
    return max((later - sooner for sooner, later in pairwise(times)), default=0.0)


def _last_event(one: Served, end_s: float) -> float:
    """When a stream last brought something in the window; what its abort brought came later. end_s where it had not begun."""
    inside = bisect_right(one.event_s, end_s)
    return one.event_s[inside - 1] if inside else end_s


def _end_of_wait(one: Served, end_s: float) -> float:
    return end_s if one.first_s is None else min(one.first_s, end_s)


def _point(
    served: Sequence[Served], rate: float, tpot: Sequence[float], waits: Sequence[float], balances: Sequence[float], good: Sequence[Served]
) -> Point:
    """tpot in ms, waits for the first token in s, degrees of `good`."""
    failed = Counter(one.error for one in served if one.error is not None)
    return {
        "requests_per_s": rate,
        "requests": len(served),
        "p50_tpot_ms": round(percentile(tpot, 0.5), 3),
        "p99_tpot_ms": round(percentile(tpot, 0.99), 3),
        "mean_tpot_ms": round(sum(tpot) / len(tpot), 3) if tpot else math.nan,
        "p99_ttft_s": round(percentile(waits, 0.99), 3),
        "kv_max_over_mean": round(sum(balances) / len(balances), 3) if balances else None,
        "degrees": dict(sorted(Counter(one.degree for one in good if one.degree is not None).items())),
        "longest_send_delay_s": round(max((one.sent_s - one.arrival.at_s for one in served), default=0.0), 3),
        "failed": dict(failed.most_common(3)),
    }


def graph_share(log: str) -> float | None:
    """Of the decode steps that SGLang logged, those that ran as a CUDA graph; None where it logged none."""
    graphs = [found == "True" for found in DECODE_LINE.findall(log)]
    return round(sum(graphs) / len(graphs), 3) if graphs else None


def holds(found: Point, limit_ms: float) -> bool:
    return not found["failed"] and found["p99_tpot_ms"] <= limit_ms and found["p99_ttft_s"] <= MOST_TTFT_S


def highest_rate(points: Sequence[Point], limit_ms: float) -> float:
    """Highest rate held under the limit, interpolated in P99 TPOT to the next that is not held for its TPOT. 0.0 where none is held."""
    ordered = sorted(points, key=_rate)
    held = 0.0
    for index, found in enumerate(ordered):
        if not holds(found, limit_ms):
            if index == 0 or found["failed"] or found["p99_ttft_s"] > MOST_TTFT_S:
                return held
            below = ordered[index - 1]
            share = (limit_ms - below["p99_tpot_ms"]) / (found["p99_tpot_ms"] - below["p99_tpot_ms"])
            return round(held + share * (found["requests_per_s"] - held), 3)
        held = found["requests_per_s"]
    return held


RATE_KEYS = {
    "stock": "rate_over_stock",
    "whole": "rate_over_whole",
    "whole-only": "rate_over_whole_only",
    "length-buckets": "rate_over_length_buckets",
    "static-dcp": "rate_over_static_dcp",
}


def rate_key(name: str) -> str | None:
    """What ours over this contender's rate is called; None of those that nothing is said of."""
    return "rate_over_fixed" if name.startswith("fixed-") else RATE_KEYS.get(name)


def ratios(points: Mapping[str, Sequence[Point]], limit_ms: float) -> dict[str, Any]:
    """Our highest rate over the others', and stock's P99 over ours at the highest rate that stock was measured at and held. Where ours was
    not measured there it is ours at the next higher rate, which is no better: `p99_at` says both rates."""
    rates = {name: highest_rate(found, limit_ms) for name, found in points.items()}
    ours = rates.get("ours", 0.0)
    result: dict[str, Any] = {key: round(ours / rate, 3) for name, rate in rates.items() if (key := rate_key(name)) and rate}
    top = max((found for found in points.get("stock", ()) if holds(found, limit_ms)), key=_rate, default=None)
    if top is not None:
        mine = min(
            (found for found in points.get("ours", ()) if not found["failed"] and _rate(found) >= _rate(top)), key=_rate, default=None
        )
        if mine is not None:
            result["p99_over_stock"] = round(top["p99_tpot_ms"] / mine["p99_tpot_ms"], 3)
            result["p99_at"] = {"stock": _rate(top), "ours": _rate(mine)}
    return {"limit_ms": limit_ms, "rates": rates, **result}


def _rate(found: Point) -> float:
    return float(found["requests_per_s"])
