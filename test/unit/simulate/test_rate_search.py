"""The search finds the crossing of a known curve, for several limits, and knows when there is none."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from benchmark.simulate.rate_search import RateSearch


def search_of(curve, guess: float = 20.0, unstable_from: float = 1e9) -> RateSearch:
    def evaluate(rate: float):
        return SimpleNamespace(unstable=rate >= unstable_from, p99_wait_s=0.0, p99_tpot_ms=curve(rate), mean_tpot_ms=0.9 * curve(rate))

    return RateSearch(evaluate, guess)


@pytest.mark.parametrize("guess", [1.0, 20.0, 200.0])
@pytest.mark.parametrize("limit", [50.0, 75.0, 100.0])
def test_known_curve(guess: float, limit: float):
    search = search_of(lambda rate: 40 + 0.5 * rate, guess)
    assert search.highest_rate(limit) == pytest.approx((limit - 40) / 0.5, rel=0.01)
    assert search.highest_rate(limit, "mean") == pytest.approx((limit / 0.9 - 40) / 0.5, rel=0.01)


def test_points_are_shared_between_limits():
    search = search_of(lambda rate: 40 + 0.5 * rate)
    search.highest_rate(75.0)
    count = len(search.points)
    search.highest_rate(75.0)
    assert len(search.points) == count


def test_no_rate_is_held_or_all_are_unstable_above():
    assert search_of(lambda _: 120.0).highest_rate(100.0) == 0.0
    assert search_of(lambda _: 50.0, unstable_from=33.0).highest_rate(100.0) == pytest.approx(33.0, rel=0.08)
    with pytest.raises(ValueError, match="statistic"):
        search_of(lambda _: 50.0).highest_rate(60.0, "p50")


def test_a_near_answer_saves_runs_and_changes_none():
    def count(near: float | None) -> tuple[float, int]:
        search = search_of(lambda rate: 40 + 0.5 * rate, 10.0)
        return search.highest_rate(75.0, near=near), len(search.points)

    (far, far_runs), (close, close_runs), (wrong, _) = count(None), count(71.0), count(9.0)
    assert far == pytest.approx(70.0, rel=0.01) and close == pytest.approx(70.0, rel=0.01) and wrong == pytest.approx(70.0, rel=0.01)
    assert close_runs == 2 < far_runs


def test_latency_counts_waiting_instead_of_limiting_it():
    def evaluate(rate: float):
        return SimpleNamespace(unstable=False, p99_wait_s=11.0 * rate / 20, p99_tpot_ms=50.0, mean_tpot_ms=50.0, p99_latency_ms=40 + rate)

    search = RateSearch(evaluate, 20.0)
    assert search.highest_rate(75.0, "latency") == pytest.approx(35.0, rel=0.01)
    assert search.highest_rate(75.0, "p99") < 20.0
