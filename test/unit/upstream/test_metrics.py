"""Metrics of an instance: names, when gauges are set, what is counted once."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from prometheus_client import REGISTRY

from sglang_dcp.ledger.counters import LedgerCounters
from sglang_dcp.ledger.messages import Row
from sglang_dcp.ledger.retention import RetentionCounters
from sglang_dcp.upstream.observe.exchange_time import DeviceStopwatch, HostStopwatch, MeasuredTransport, measured
from sglang_dcp.upstream.observe.metrics import GAUGE_INTERVAL_SECONDS, StepMetrics, count_attention_rows
from sglang_dcp.upstream.step.runtime import Counters

LABELS = {"dp_rank": 1, "model_name": "m"}


class Clock:
    now = 10.0

    def __call__(self) -> float:
        return self.now


class Transport:
    def all_to_all(
        self, message: torch.Tensor, send_splits: Sequence[int], receive_splits: Sequence[int], *, step: int, layer: int, stage: str
    ) -> torch.Tensor:
        return message


def read(name: str) -> float:
    value = REGISTRY.get_sample_value(f"sglang:dyncp_{name}", {key: str(value) for key, value in LABELS.items()})
    assert value is not None
    return value


def make_runtime() -> Any:
    held = {(0, 7): [(0, 3)]}
    guests = SimpleNamespace(num_pages=2, num_retained=0, pages_of=lambda home, handle: held.get((home, handle), ()))
    participant = SimpleNamespace(
        rank=1,
        page_size=16,
        kv_tokens=np.array([5, 96]),
        home_requests=np.array([0, 3]),
        guests=guests,
        rows_of=[(Row(7, 10, 1), Row(8, 10, 1)), (Row(1, 10, 1),)],
        counters=LedgerCounters(),
        retention=SimpleNamespace(num_pages_here=0, counters=RetentionCounters()),
    )
    transport = measured(Transport(), torch.device("cpu"))
    queues = SimpleNamespace(parked=[])
    return SimpleNamespace(participant=participant, own_batch=[1, 2], transport=transport, counters=Counters(), queues=queues)


@pytest.fixture(scope="module")
def metrics() -> StepMetrics:
    return StepMetrics(LABELS, Clock())


def test_a_step(metrics: StepMetrics) -> None:
    runtime, clock = make_runtime(), metrics._clock
    assert isinstance(clock, Clock)
    metrics.after_step(runtime)
    assert [read(name) for name in ("kv_tokens", "guest_tokens", "home_requests", "attention_rows")] == [96, 32, 3, 3]
    assert read("exchange_seconds_count") == 0
    runtime.transport.all_to_all(torch.zeros(1), [1], [1], step=0, layer=0, stage="dispatch")
    runtime.participant.guests.num_pages = 5
    runtime.participant.counters.degree_growths = 2
    runtime.counters = Counters(graph_steps=3, sharded_graph_steps=2, eager_steps=1)
    runtime.participant.counters.admission_waits = [0.5]
    runtime.queues.parked = ["sits out", "does too"]
    metrics.after_step(runtime)
    assert (read("guest_tokens"), read("degree_growths_total"), read("sat_out_steps_total")) == (32, 0, 0), "not due yet"
    runtime.queues.parked = ["sits out"]
    assert (read("reservation_wait_seconds_sum"), read("exchange_seconds_count")) == (0.5, 1)
    runtime.participant.counters.admission_waits.clear()  # as the driver does, behind this
    for _ in range(2):
        clock.now += GAUGE_INTERVAL_SECONDS
        metrics.after_step(runtime)
    assert (read("guest_tokens"), read("degree_growths_total"), read("reservation_wait_seconds_count")) == (80, 2, 1)
    assert (read("graph_steps_total"), read("eager_steps_total"), read("sharded_graph_steps_total")) == (3, 1, 2)
    assert read("sat_out_steps_total") == 4, "two in one step, one in two more"
    metrics.observe_end({"degree_end": 4})
    assert read("request_degree_sum") == 4


def test_rows_of_an_idle_instance_are_its_guests() -> None:
    runtime = make_runtime()
    runtime.own_batch = []
    assert count_attention_rows(runtime) == 1, "handle 8 has no page here"


def test_time_in_a_failing_exchange_counts_too() -> None:
    class Failing(Transport):
        def all_to_all(self, *_arguments: Any, **_named: Any) -> torch.Tensor:
            raise RuntimeError("peer")

    transport = MeasuredTransport(Failing(), HostStopwatch())
    with pytest.raises(RuntimeError):
        transport.all_to_all(torch.zeros(1), [1], [1], step=0, layer=0, stage="return")
    (seconds,) = transport.take_seconds()
    assert seconds > 0
    assert transport.take_seconds() == []


class Stream:
    """A device's: comes to an event when `now` has come to its time. Milliseconds."""

    def __init__(self) -> None:
        self.end = self.now = 0.0
        self.num_events = 0

    def new_event(self) -> Any:
        self.num_events += 1
        event = SimpleNamespace(time=0.0)

        def elapsed_time(other: Any) -> float:
            assert event.query() and other.query(), "asked before the device came to it"
            return other.time - event.time

        event.record = lambda: setattr(event, "time", self.end)
        event.query = lambda: event.time <= self.now
        event.elapsed_time = elapsed_time
        return event


def test_an_exchange_that_is_only_queued_is_timed_on_the_device() -> None:
    """The host returns at once; a step is observed when the device has run it, once, and no event is waited for."""
    stream = Stream()

    class Queued(Transport):
        def all_to_all(self, message: torch.Tensor, *_arguments: Any, **_named: Any) -> torch.Tensor:
            stream.end += 3.0
            return message

    transport = MeasuredTransport(Queued(), DeviceStopwatch(stream.new_event))
    for _ in range(2):
        for _ in range(2):
            transport.all_to_all(torch.zeros(1), [1], [1], step=0, layer=0, stage="return")
            stream.end += 10.0  # other kernels
        assert transport.take_seconds() == [], "the device has not come to it"
    stream.now = 30.0
    assert transport.take_seconds() == [pytest.approx(0.006)]
    assert transport.take_seconds() == []
    stream.now = stream.end
    assert transport.take_seconds() == [pytest.approx(0.006)]
    made = stream.num_events
    transport.all_to_all(torch.zeros(1), [1], [1], step=0, layer=0, stage="return")
    assert stream.num_events == made, "events are used again"
