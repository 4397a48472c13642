"""What the exchange of a step takes, on the clock of the device that waits for it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from sglang_dcp.dataflow.transport.base import Transport


class Stopwatch(Protocol):
    """Adds up spans of a step."""

    def start(self) -> Any: ...

    def stop(self, started: Any) -> None: ...

    def take(self) -> list[float]:
        """A step ends. Seconds of each step that had spans, once, when they are known."""
        ...


class HostStopwatch:
    """For transports that return when the exchange has ended."""

    def __init__(self) -> None:
        self._seconds = 0.0

    def start(self) -> float:
        return time.perf_counter()

    def stop(self, started: float) -> None:
        self._seconds += time.perf_counter() - started

    def take(self) -> list[float]:
        seconds, self._seconds = self._seconds, 0.0
        return [seconds] if seconds else []


def _timing_event() -> Any:
    return torch.cuda.Event(enable_timing=True)


class DeviceStopwatch:
    """For transports that return when the exchange is queued: a pair of events around it, on the current stream. Nothing waits for them: a
    step's seconds are known some steps later."""

    def __init__(self, new_event: Callable[[], Any] = _timing_event) -> None:
        self._new_event = new_event
        self._spare: list[Any] = []
        self._spans: list[tuple[Any, Any]] = []
        self._steps: deque[list[tuple[Any, Any]]] = deque()

    def start(self) -> Any:
        return self._record()

    def stop(self, started: Any) -> None:
        self._spans.append((started, self._record()))

    def _record(self) -> Any:
        event = self._spare.pop() if self._spare else self._new_event()
        event.record()
        return event

    def take(self) -> list[float]:
        if self._spans:
            self._steps.append(self._spans)
            self._spans = []
        ended = []
        while self._steps and self._steps[0][-1][1].query():
            spans = self._steps.popleft()
            ended.append(sum(start.elapsed_time(end) for start, end in spans) / 1000)
            self._spare += (event for span in spans for event in span)
        return ended


class MeasuredTransport:
    """A transport whose exchanges are timed, waiting for peers included."""

    def __init__(self, transport: Transport, stopwatch: Stopwatch) -> None:
        self._transport, self._stopwatch = transport, stopwatch

    def all_to_all(
        self, message: torch.Tensor, send_splits: Sequence[int], receive_splits: Sequence[int], *, step: int, layer: int, stage: str
    ) -> torch.Tensor:
        started = self._stopwatch.start()
        try:
            return self._transport.all_to_all(message, send_splits, receive_splits, step=step, layer=layer, stage=stage)
        finally:
            self._stopwatch.stop(started)

    def take_seconds(self) -> list[float]:
        """A step ends. Seconds in the exchange of each step that had one, once, when they are known."""
        return self._stopwatch.take()


def measured(transport: Transport, device: torch.device) -> MeasuredTransport:
    """The transport of an instance on `device`, timed where its exchanges end."""
    return MeasuredTransport(transport, HostStopwatch() if device.type == "cpu" else DeviceStopwatch())
