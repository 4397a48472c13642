"""The highest request rate that a policy holds under a limit on TPOT."""

from __future__ import annotations

import math
from collections.abc import Callable

from benchmark.simulate.results import SimulationResult

MAX_WAIT_S = 10.0
LOWEST_RATE = 0.25
HIGHEST_RATE = 60.0 * 8
STATISTICS = ("p99", "mean", "latency")


def statistic_ms(result: SimulationResult, statistic: str) -> float:
    """The measured TPOT, or infinity for a run that does not count: unstable, or P99 wait for admission beyond MAX_WAIT_S.

    `p99` and `mean` count from admission; `latency` is the P99 counted from arrival, where waiting needs no limit of its own.
    """
    if statistic not in STATISTICS:
        raise ValueError(f"statistic {statistic!r}: expected one of {STATISTICS}")
    if statistic == "latency":
        return math.inf if result.unstable else result.p99_latency_ms
    if result.unstable or result.p99_wait_s > MAX_WAIT_S:
        return math.inf
    return result.p99_tpot_ms if statistic == "p99" else result.mean_tpot_ms


class RateSearch:
    """Searches one policy on one workload and seed; all limits share the simulated rates.

    `evaluate(rate)` simulates. A rate is held when the statistic is within the limit; between the last held and the first failing rate,
    at most `precision` apart, the crossing is interpolated.
    """

    def __init__(self, evaluate: Callable[[float], SimulationResult], first_guess: float, precision: float = 0.08) -> None:
        self._evaluate = evaluate
        self._guess = first_guess
        self._precision = precision
        self.points: dict[float, SimulationResult] = {}

    def result_at(self, rate: float) -> SimulationResult:
        """The simulation at a rate, run once."""
        if rate not in self.points:
            self.points[rate] = self._evaluate(rate)
        return self.points[rate]

    def highest_rate(self, limit_ms: float, statistic: str = "p99", near: float | None = None) -> float:
        """Requests per second; 0 when not even LOWEST_RATE is held. `near` is where to look first, an answer of a like case."""

        def excess(rate: float) -> float:
            return math.log(statistic_ms(self.result_at(rate), statistic) / limit_ms)

        low, high = self._bracket(excess, near)
        if low == 0.0:
            return 0.0
        while high / low > 1 + self._precision:
            below, above = excess(low), excess(high)
            share = 0.5 if math.isinf(above) else min(0.85, max(0.15, -below / (above - below)))
            middle = low * (high / low) ** share
            if excess(middle) <= 0:
                low = middle
            else:
                high = middle
        below, above = excess(low), excess(high)
        return low if math.isinf(above) or above == below else low * (high / low) ** (-below / (above - below))

    def _bracket(self, excess: Callable[[float], float], near: float | None) -> tuple[float, float]:
        """A held rate (0 if none) and the lowest failing rate above it, from known points first; steps outwards grow."""
        known = sorted(self.points)
        if near and not any(near / (1 + self._precision) < rate < near * (1 + self._precision) for rate in known):
            known.append(near)
        known = known or [self._guess]
        failing = [rate for rate in known if excess(rate) > 0]
        high = min(failing, default=0.0)
        held = [rate for rate in known if excess(rate) <= 0 and (not high or rate < high)]
        low = max(held, default=0.0)
        step = 1 + self._precision if near else 1.5
        while not low:
            rate, step = high / step, min(1.5, step * step)
            if rate < LOWEST_RATE:
                return 0.0, high
            low, high = (rate, high) if excess(rate) <= 0 else (0.0, rate)
        while not high:
            rate, step = low * step, min(1.5, step * step)
            if rate > HIGHEST_RATE:
                return low, low
            low, high = (rate, 0.0) if excess(rate) <= 0 else (low, rate)
        return low, high
