"""What a run leaves: per-request latencies, balance over time, counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from benchmark.simulate.cluster import SimulatedRequest
from benchmark.simulate.settings import SimulationSettings

# Requests that arrive in the first tenth of a run see a cluster that still fills up; they load it but are not measured.
WARM_UP_SHARE = 0.1
SAMPLE_STEPS = 8


@dataclass(frozen=True)
class SimulationResult:
    """One run. Times in milliseconds unless the name says seconds; `tpot` is a request's mean time per output token.

    tpot counts from admission to the last token; `latency` counts from arrival, so it includes waiting; `gap` is over tokens, not requests.
    A rejected request counts as an infinite tpot. Balance = max/mean over instances, averaged over time.
    """

    unstable: bool
    num_requests: int
    num_finished: int
    num_rejected: int
    num_retractions: int
    num_growths: int
    mean_tpot_ms: float
    p50_tpot_ms: float
    p99_tpot_ms: float
    p99_gap_ms: float
    p99_latency_ms: float
    p99_wait_s: float
    kv_balance: float
    batch_balance: float
    mean_batch: float
    mean_kv_tokens: float
    tokens_per_second: float
    duration_s: float
    start_degrees: dict[int, int] = field(default_factory=dict)
    end_degrees: dict[int, int] = field(default_factory=dict)
    num_moved_tokens: int = 0
    timeline: list[tuple[float, float, float, float, float, float]] = field(default_factory=list, repr=False)

    def as_dict(self, with_timeline: bool = False) -> dict[str, Any]:
        """JSON form; the timeline (seconds, step ms, KV max, KV mean, batch max, batch mean) only on request."""
        data = asdict(self)
        if not with_timeline:
            del data["timeline"]
        return data


class Recorder:
    """Collects while the simulation runs."""

    def __init__(self, settings: SimulationSettings) -> None:
        self._settings = settings
        self.num_finished = 0
        self.num_rejected = 0
        self.num_retractions = 0
        self.num_growths = 0
        self.num_moved_tokens = 0
        self.steps: list[tuple[float, int]] = []
        self.timeline: list[tuple[float, float, float, float, float, float]] = []

    def record_step(self, clock: float, duration: float, kv_tokens: np.ndarray, batch: np.ndarray, num_running: int) -> None:
        """Every step counts for the token gaps, every eighth for the balance."""
        if len(self.steps) % SAMPLE_STEPS == 0:
            self.timeline.append(
                (clock, duration * 1e3, float(kv_tokens.max()), float(kv_tokens.mean()), float(batch.max()), float(batch.mean()))
            )
        self.steps.append((duration, num_running))

    def summarise(self, requests: Sequence[SimulatedRequest], unstable: bool) -> SimulationResult:
        """Latencies over the measured requests; balance over the span of arrivals after warm-up."""
        first, last = requests[0].arrival, requests[-1].arrival
        measured_from = first + WARM_UP_SHARE * (last - first)
        measured = [request for request in requests if request.arrival >= measured_from]
        done = [request for request in measured if request.finish >= 0]
        lost = self.num_rejected * len(measured) // len(requests)
        tpot = np.array([(r.finish - r.admitted) / r.output for r in done] + [np.inf] * lost) * 1e3
        latency = np.array([(r.finish - r.arrival) / r.output for r in done] + [np.inf] * lost) * 1e3
        wait = np.array([r.wait for r in done] or [0.0])
        span = np.array([row for row in self.timeline if measured_from <= row[0] <= last] or self.timeline or [(0.0,) * 6])
        weight = span[:, 1]
        finished_tokens = sum(request.output for request in requests if request.finish >= 0)
        duration = max((request.finish for request in requests), default=0.0) - first
        return SimulationResult(
            unstable=unstable,
            num_requests=len(requests),
            num_finished=self.num_finished,
            num_rejected=self.num_rejected,
            num_retractions=self.num_retractions,
            num_growths=self.num_growths,
            mean_tpot_ms=float(tpot.mean()) if len(tpot) else float("inf"),
            p50_tpot_ms=_quantile(tpot, 0.5),
            p99_tpot_ms=_quantile(tpot, 0.99),
            p99_gap_ms=self._gap_quantile(0.99),
            p99_latency_ms=_quantile(latency, 0.99),
            p99_wait_s=_quantile(wait, 0.99),
            kv_balance=_balance(span[:, 2], span[:, 3], weight),
            batch_balance=_balance(span[:, 4], span[:, 5], weight),
            mean_batch=float(np.average(span[:, 5], weights=weight)) if weight.sum() else 0.0,
            mean_kv_tokens=float(np.average(span[:, 3], weights=weight)) if weight.sum() else 0.0,
            tokens_per_second=finished_tokens / duration if duration > 0 else 0.0,
            duration_s=duration,
            start_degrees=dict(sorted(Counter(r.start_degree for r in requests if r.start_degree).items())),
            end_degrees=dict(sorted(Counter(r.end_degree for r in requests if r.end_degree).items())),
            num_moved_tokens=self.num_moved_tokens,
            timeline=self.timeline,
        )

    def _gap_quantile(self, share: float) -> float:
        if not self.steps:
            return float("inf")
        steps = np.array(self.steps)
        order = np.argsort(steps[:, 0])
        weight = np.cumsum(steps[order, 1])
        return float(steps[order[np.searchsorted(weight, share * weight[-1])], 0]) * 1e3


def _quantile(values: np.ndarray, share: float) -> float:
    """The smallest value that at least `share` of all values do not exceed; infinity for none."""
    return float(np.quantile(values, share, method="inverted_cdf")) if len(values) else float("inf")


def _balance(highest: np.ndarray, mean: np.ndarray, weight: np.ndarray) -> float:
    """Time average of max/mean over the moments with anything to balance."""
    busy = mean > 0
    return float(np.average(highest[busy] / mean[busy], weights=weight[busy])) if busy.any() else 1.0
