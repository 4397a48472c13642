"""Prometheus metrics of an instance (--enable-metrics), beside SGLang's own and with its labels."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sglang_dcp.ledger.eviction import REASONS
from sglang_dcp.upstream.observe.exchange_time import MeasuredTransport, measured

if TYPE_CHECKING:
    from sglang_dcp.upstream.step.runtime import Runtime

PREFIX = "sglang:dyncp_"
GAUGE_INTERVAL_SECONDS = 0.1
"""Gauges are set at most this often; the step path pays one clock reading otherwise."""

EXCHANGE_TEXT = "Time in the exchange of one sharded step without a graph, waiting for peers included."
CROSSING_TEXT = "Forward passes with a row of this instance, or a guest, whose home and shards lie in different nodes."
EVICTIONS_TEXT = "Sequences of this home that gave way: to growth, an admission, local requests, or the share of a pool."
SAT_OUT_TEXT = "Steps, prefills included, that running requests of this home sat out: without a page for their next token."
EXCHANGE_BUCKETS = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
WAIT_BUCKETS = (0.001, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
DEGREE_BUCKETS = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 32, 72)


class StepMetrics:
    """One per scheduler process. labels: those of SGLang's scheduler collector."""

    def __init__(self, labels: Mapping[str, Any], clock: Callable[[], float] = time.monotonic) -> None:
        # Importable only after SGLang has set PROMETHEUS_MULTIPROC_DIR.
        from prometheus_client import Counter, Gauge, Histogram

        self._clock = clock
        self._due = 0.0
        self._counted: dict[Any, int] = {}
        self._sat_out = 0

        def gauge(name: str, text: str) -> Any:
            return Gauge(PREFIX + name, text, labelnames=list(labels), multiprocess_mode="mostrecent").labels(**labels)

        def counter(name: str, text: str, *more: str) -> Any:
            made = Counter(PREFIX + name, text, labelnames=[*labels, *more])
            return made if more else made.labels(**labels)

        def histogram(name: str, text: str, buckets: Sequence[float]) -> Any:
            return Histogram(PREFIX + name, text, labelnames=list(labels), buckets=buckets).labels(**labels)

        self.kv_tokens = gauge("kv_tokens", "KV tokens in this instance's pool, guests included, cached prefixes that can be evicted not.")
        self.guest_tokens = gauge("guest_tokens", "KV tokens in this instance's pool that belong to requests of other homes.")
        self.home_requests = gauge("home_requests", "Requests whose home this instance is: running, waiting or sitting out.")
        self.attention_rows = gauge("attention_rows", "Rows (requests) that this instance attended in the last step, guests included.")
        self.request_degree = histogram("request_degree", "Degree of requests when they ended.", DEGREE_BUCKETS)
        self.degree_growths = counter("degree_growths_total", "Shards that requests of this home gained while decoding.")
        self.reservation_wait = histogram("reservation_wait_seconds", "Wait of requests of this home for their pages.", WAIT_BUCKETS)
        self.retractions = counter("retractions_total", "Requests of this home that gave their pages back to make room.")
        self.sat_out_steps = counter("sat_out_steps_total", SAT_OUT_TEXT)
        self.graph_steps = counter("graph_steps_total", "Forward passes of this instance that ran as a CUDA graph.")
        self.sharded_graph_steps = counter("sharded_graph_steps_total", "Forward passes that ran as a CUDA graph with sharded rows.")
        self.eager_steps = counter("eager_steps_total", "Forward passes of this instance that ran without a graph.")
        self.crossing_steps = counter("crossing_steps_total", CROSSING_TEXT)
        self.retained_tokens = gauge("retained_tokens", "KV tokens in this instance's pool that requests left to later ones.")
        self.prefix_hits = counter("prefix_hits_total", "Requests of this home that took over what an earlier one left, or read it.")
        evictions = counter("evictions_total", EVICTIONS_TEXT, "reason")
        self.evictions = {reason: evictions.labels(**labels, reason=reason) for reason in REASONS}
        self.exchange = histogram("exchange_seconds", EXCHANGE_TEXT, EXCHANGE_BUCKETS)

    def observe_end(self, where: Mapping[str, Any]) -> None:
        """A request ended. where: its meta_info.dyncp."""
        self.request_degree.observe(where["degree_end"])

    def after_step(self, runtime: Runtime) -> None:
        """Called once per step, when the control messages of the next one are settled."""
        part = runtime.participant
        if isinstance(runtime.transport, MeasuredTransport):
            for seconds in runtime.transport.take_seconds():
                self.exchange.observe(seconds)
        for wait in part.counters.admission_waits:
            self.reservation_wait.observe(wait)
        self._sat_out += len(runtime.queues.parked)
        now = self._clock()
        if now < self._due:
            return
        self._due = now + GAUGE_INTERVAL_SECONDS
        self.kv_tokens.set(int(part.kv_tokens[part.rank]))
        self.guest_tokens.set((part.guests.num_pages - part.guests.num_retained) * part.page_size)
        self.retained_tokens.set(part.retention.num_pages_here * part.page_size)
        self.home_requests.set(int(part.home_requests[part.rank]))
        self.attention_rows.set(count_attention_rows(runtime))
        for counter, total in self._totals(runtime).items():
            counter.inc(total - self._counted.get(counter, 0))
            self._counted[counter] = total

    def _totals(self, runtime: Runtime) -> dict[Any, int]:
        """What the counters are to show, since the start."""
        ledger, passes, kept = runtime.participant.counters, runtime.counters, runtime.participant.retention.counters
        return {
            self.degree_growths: ledger.degree_growths,
            self.retractions: ledger.retractions,
            self.sat_out_steps: self._sat_out,
            self.graph_steps: passes.graph_steps,
            self.eager_steps: passes.eager_steps,
            self.sharded_graph_steps: passes.sharded_graph_steps,
            self.crossing_steps: passes.crossing_steps,
            self.prefix_hits: kept.hits,
            **{self.evictions[reason]: count for reason, count in kept.evictions.items()},
        }


def count_attention_rows(runtime: Runtime) -> int:
    """Rows of the step: the own batch, and the rows of other homes that have pages here."""
    part = runtime.participant
    others = ((home, row) for home, rows in enumerate(part.rows_of) if home != part.rank for row in rows)
    return len(runtime.own_batch) + sum(1 for home, row in others if part.guests.pages_of(home, row.handle))


def attach_metrics(runtime: Runtime) -> None:
    """Starts measuring in this scheduler process, where SGLang does."""
    context = runtime.scheduler.metrics_collector_context
    if not context.current_scheduler_metrics_enabled:
        return
    runtime.metrics = StepMetrics(context.collector.labels)
    runtime.transport = measured(runtime.transport, runtime.device)
