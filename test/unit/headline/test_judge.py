"""The headline's judgements: which rate is held, where a limit is crossed, what is divided by what; what is measured of a window."""

from __future__ import annotations

import math
from typing import Any

import pytest

from benchmark.headline.client import Arrival, Served
from benchmark.headline.contenders import contenders
from benchmark.headline.judge import graph_share, highest_rate, holds, percentile, point, ratios, tpot_between, window_point
from benchmark.headline.traffic import arrivals


def served(tpot_ms: float, *, wait_s: float = 0.1, error: str | None = None) -> Served:
    return Served(Arrival(0.0, 10, 11), 0.0, wait_s, wait_s + tpot_ms / 100, 10, 1, error)


def at(rate: float, p99: float, **changes: Any) -> dict[str, Any]:
    return {"requests_per_s": rate, "p99_tpot_ms": p99, "p99_ttft_s": 0.1, "failed": {}} | changes


def test_a_point_leaves_out_the_first_tenth_and_counts_failures_anywhere() -> None:
    found = point([served(900.0, error="gone")] + [served(float(ms)) for ms in range(1, 20)], 4.0, [1.0, 2.0])
    assert found["p99_tpot_ms"] == 19.0 and found["p50_tpot_ms"] == pytest.approx(10.0, abs=1.0)
    assert found["failed"] == {"gone": 1} and found["kv_max_over_mean"] == 1.5 and found["requests"] == 20


def test_percentiles_are_values_that_were_seen() -> None:
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0 and percentile(list(range(1, 101)), 0.99) == 99
    assert math.isnan(percentile([], 0.5))


def test_a_growing_queue_or_a_failure_is_not_held() -> None:
    assert holds(at(4, 20.0), 20.0)
    assert not holds(at(4, 20.1), 20.0) and not holds(at(4, 5.0, p99_ttft_s=11.0), 20.0) and not holds(at(4, 5.0, failed={"x": 1}), 20.0)


def test_the_highest_rate_is_interpolated_where_the_limit_is_crossed() -> None:
    assert highest_rate([at(8, 30.0), at(4, 10.0), at(6, 20.0)], 25.0) == 7.0
    assert highest_rate([at(4, 10.0), at(6, 20.0)], 25.0) == 6.0
    assert highest_rate([at(4, 30.0)], 25.0) == 0.0
    assert highest_rate([at(4, 10.0), at(6, 12.0, p99_ttft_s=40.0)], 25.0) == 4.0


def test_ratios_are_of_our_rate_and_of_stocks_p99_at_its_highest_rate() -> None:
    points = {"stock": [at(4, 10.0), at(6, 40.0)], "whole": [at(4, 10.0), at(6, 25.0)], "ours": [at(4, 8.0), at(6, 10.0), at(8, 25.0)]}
    found = ratios(points, 25.0)
    assert found["rates"] == {"stock": 5.0, "whole": 6.0, "ours": 8.0}
    assert found["rate_over_stock"] == 1.6 and found["rate_over_whole"] == pytest.approx(1.333) and found["p99_over_stock"] == 1.25
    assert "rate_over_length_buckets" not in found and found["p99_at"] == {"stock": 4, "ours": 4}


def test_stocks_p99_is_compared_with_ours_at_the_next_higher_rate_where_ours_was_not_measured() -> None:
    ours = [at(4, 1.0), at(8, 25.0), at(10, 30.0)]
    found = ratios({"stock": [at(4, 10.0), at(7, 40.0)], "ours": ours}, 60.0)
    assert found["p99_over_stock"] == 1.6 and found["p99_at"] == {"stock": 7, "ours": 8}
    assert "p99_over_stock" not in ratios({"stock": [at(7, 40.0)], "ours": ours[:1]}, 60.0), "a lower rate says nothing"
    assert "p99_over_stock" not in ratios({"stock": [at(7, 40.0)], "ours": [at(8, 25.0, failed={"refused": 1})]}, 60.0)


def test_the_share_of_graphs_is_of_the_decode_steps_that_are_logged() -> None:
    line = "[2026-11-30 12:09:11 DP1 TP1 EP1] Decode batch, #running-req: 128, cuda graph: {}, gen throughput (token/s): 4154.16"
    prefill = "[2026-11-30 12:09:11 DP1 TP1 EP1] Prefill batch, #new-seq: 1, cuda graph: False"
    assert graph_share("\n".join([*map(line.format, (True, False, True)), prefill])) == 0.667
    assert graph_share(prefill) is None


def test_all_contenders_get_equal_arrivals_and_a_faster_rate_the_same_requests_sooner() -> None:
    slow, fast = arrivals(0.03, 4.0, 30.0, 1, 50_000), arrivals(0.03, 8.0, 15.0, 1, 50_000)
    assert [(a.prompt_tokens, a.output_tokens) for a in slow] == [(a.prompt_tokens, a.output_tokens) for a in fast]
    assert max(a.prompt_tokens for a in slow) <= 50_000 and slow == arrivals(0.03, 4.0, 30.0, 1, 50_000)


def stream(events: list[tuple[float, int]], *, output: int = 1000, at_s: float = 0.0, **changes: Any) -> Served:
    """events: seconds, tokens until then."""
    times, counts = [at for at, _ in events], [count for _, count in events]
    one = Served(Arrival(at_s, 10, output, changes.pop("begun", False)), at_s, event_s=times, event_tokens=counts)
    one.first_s, one.last_s = (times[0], times[-1]) if times else (None, None)
    for name, value in changes.items():
        setattr(one, name, value)
    return one


def test_tpot_is_between_the_first_and_last_event_inside() -> None:
    one = stream([(0.5, 1), (2.0, 100), (3.0, 140), (4.0, 180), (5.5, 900)])
    assert tpot_between(one, 1.0, 5.0) == pytest.approx(2.0 / 80 * 1000)
    assert tpot_between(one, 2.0, 3.0) == pytest.approx(25.0), "events on the border are inside"
    assert tpot_between(one, 2.1, 3.9) is None, "one event measures nothing"
    assert (
        tpot_between(stream([(2.0, 1), (3.0, 32)]), 1.0, 5.0) is None and tpot_between(stream([(2.0, 1), (3.0, 33)]), 1.0, 5.0) is not None
    )
    assert tpot_between(stream([]), 1.0, 5.0) is None


def test_a_window_measures_begun_and_new_behind_its_first_part() -> None:
    """10 s: what is measured begins at 1.5. Before it all is slow, and nobody is measured by that."""
    begun = stream([(0.1, 1), (1.4, 10), (2.0, 20), (6.0, 220), (9.9, 400)], begun=True, cut=True, degree=2)
    new = stream([(3.0, 1), (7.0, 101)], at_s=2.9, output=101)
    early = stream([(1.0, 1), (1.4, 60)], at_s=0.2, output=60)
    waiting = stream([], at_s=4.0, cut=True, degree=None)
    stuck = stream([(2.0, 1), (3.0, 51), (10.1, 52)], at_s=1.9, cut=True, degree=None)  # the last one is its abort's
    broken = stream([(2.0, 1)], at_s=1.6, error="no answer: x")
    found = window_point([begun, new, early, waiting, stuck, broken], 4.0, [1.5], 10.0)
    assert found["measured"] == 3 and found["begun"] == 1 and found["cut_off"] == 3 and found["silent"] == 1
    assert found["p50_tpot_ms"] == pytest.approx(7.9 / 380 * 1000, abs=0.001) and found["p99_tpot_ms"] == 40.0
    assert found["failed"] == {"no answer: x": 1} and found["degrees"] == {1: 2, 2: 1} and found["degrees_unknown"] == 2
    assert found["p99_ttft_s"] == 6.0, "who still waits has waited until the end"
    slowest = [(one["tpot_ms"], one["longest_gap_s"]) for one in found["slowest"]]
    assert slowest == [(40.0, 4.0), (20.789, 4.0), (20.0, 7.0)], "the last one brought nothing from 3.0 on"
    assert found["requests"] == 6 and found["seconds"] == 10.0 and found["kv_max_over_mean"] == 1.5


def test_only_ours_runs_our_package_and_all_skip_prefills_in_the_same_way() -> None:
    known = contenders(2)
    assert {name for name, one in known.items() if not one.dyncp} == {"stock", "static-dcp"}
    assert all("fake" in one.flags and one.fields for one in known.values())
