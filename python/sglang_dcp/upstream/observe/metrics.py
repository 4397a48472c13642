"""Prometheus metrics of an instance (--enable-metrics), beside SGLang's own and with its labels."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sglang_dcp.upstream.observe.exchange_time import MeasuredTransport, measured

if TYPE_CHECKING:
    from sglang_dcp.upstream.step.binding import Binding

PREFIX = "sglang:dyncp_"
GAUGE_INTERVAL_SECONDS = 0.1
"""Gauges are set at most this often; the step path pays one clock reading otherwise."""

EXCHANGE_TEXT = "Time in the exchange of one sharded step without a graph, waiting for peers included."
EXCHANGE_BUCKETS = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
WAIT_BUCKETS = (0.001, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
DEGREE_BUCKETS = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 32)


class StepMetrics:
    """One per scheduler process. labels: those of SGLang's scheduler collector."""

    def __init__(self, labels: Mapping[str, Any], clock: Callable[[], float] = time.monotonic) -> None:
        # Importable only after SGLang has set PROMETHEUS_MULTIPROC_DIR.
        from prometheus_client import Counter, Gauge, Histogram

        self._clock = clock
        self._due = 0.0
        self._growths = self._retractions = 0
        self._graph_steps = self._eager_steps = self._sharded_graph_steps = 0

        def gauge(name: str, text: str) -> Any:
            return Gauge(PREFIX + name, text, labelnames=list(labels), multiprocess_mode="mostrecent").labels(**labels)

        def counter(name: str, text: str) -> Any:
            return Counter(PREFIX + name, text, labelnames=list(labels)).labels(**labels)

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
        self.graph_steps = counter("graph_steps_total", "Forward passes of this instance that ran as a CUDA graph.")
        self.sharded_graph_steps = counter("sharded_graph_steps_total", "Forward passes that ran as a CUDA graph with sharded rows.")
        self.eager_steps = counter("eager_steps_total", "Forward passes of this instance that ran without a graph.")
        self.exchange = histogram("exchange_seconds", EXCHANGE_TEXT, EXCHANGE_BUCKETS)

    def observe_end(self, where: Mapping[str, Any]) -> None:
        """A request ended. where: its meta_info.dyncp."""
        self.request_degree.observe(where["degree_end"])

    def after_step(self, binding: Binding) -> None:
        """Called once per step, when the control messages of the next one are settled."""
        instance = binding.instance
        if isinstance(binding.transport, MeasuredTransport):
            for seconds in binding.transport.take_seconds():
                self.exchange.observe(seconds)
        for wait in instance.admission_waits:
            self.reservation_wait.observe(wait)
        instance.admission_waits.clear()
        now = self._clock()
        if now < self._due:
            return
        self._due = now + GAUGE_INTERVAL_SECONDS
        self.kv_tokens.set(int(instance.kv_tokens[instance.rank]))
        self.guest_tokens.set(instance.guests.num_pages * instance.page_size)
        self.home_requests.set(int(instance.home_requests[instance.rank]))
        self.attention_rows.set(count_attention_rows(binding))
        self.degree_growths.inc(instance.num_degree_growths - self._growths)
        self.retractions.inc(instance.num_retractions - self._retractions)
        self._growths, self._retractions = instance.num_degree_growths, instance.num_retractions
        self.graph_steps.inc(binding.graph_steps - self._graph_steps)
        self.eager_steps.inc(binding.eager_steps - self._eager_steps)
        self.sharded_graph_steps.inc(binding.sharded_graph_steps - self._sharded_graph_steps)
        self._sharded_graph_steps = binding.sharded_graph_steps
        self._graph_steps, self._eager_steps = binding.graph_steps, binding.eager_steps


def count_attention_rows(binding: Binding) -> int:
    """Rows of the step: the own batch, and the rows of other homes that have pages here."""
    instance, batch = binding.instance, binding.local_batch
    own = 0 if batch is None or batch.forward_mode.is_idle() else len(batch.reqs)
    others = ((home, row) for home, rows in enumerate(instance.rows_of) if home != instance.rank for row in rows)
    return own + sum(1 for home, row in others if instance.guests.pages_of(home, row.handle))


def attach_metrics(binding: Binding) -> None:
    """Starts measuring in this scheduler process, where SGLang does."""
    context = binding.scheduler.metrics_collector_context
    if not context.current_scheduler_metrics_enabled:
        return
    binding.metrics = StepMetrics(context.collector.labels)
    binding.transport = measured(binding.transport, binding.device)
