"""Time between points of one rank's work: on the host, or on the GPU's stream."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

HOLD_CYCLES = 60_000_000
"""About 35 ms at 1.7 GHz: the host queues a whole run behind it, so that its own time does not show between GPU marks."""


class HostClock:
    def hold(self) -> None:
        return

    def mark(self) -> Any:
        return time.perf_counter()

    def settle(self) -> None:
        return

    def microseconds(self, begin: Any, end: Any) -> float:
        return (end - begin) * 1e6


class DeviceClock:
    """Events on the current stream."""

    def hold(self) -> None:
        torch.cuda._sleep(HOLD_CYCLES)

    def mark(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def settle(self) -> None:
        torch.cuda.synchronize()

    def microseconds(self, begin: Any, end: Any) -> float:
        return float(begin.elapsed_time(end)) * 1e3


def stage_times(
    clock: HostClock | DeviceClock, stages: Sequence[Callable[[], Any]], barrier: Callable[[], None], *, layers: int, repeats: int
) -> list[float]:
    """Median microseconds of each stage over all exchanges, the first tenth of every run left out (ranks do not start together)."""
    samples: list[list[float]] = [[] for _ in stages]
    for _ in range(repeats):
        barrier()
        clock.hold()
        marks = []
        for _ in range(layers):
            marks.append([clock.mark()])
            for stage in stages:
                stage()
                marks[-1].append(clock.mark())
        clock.settle()
        for line in marks[max(1, layers // 10) :]:
            for index, sample in enumerate(samples):
                sample.append(clock.microseconds(line[index], line[index + 1]))
    return [statistics.median(sample) for sample in samples]


def graph_time(exchange: Callable[[], None], barrier: Callable[[], None], *, layers: int, repeats: int) -> float:
    """Median microseconds of one exchange as one of `layers` in one CUDA graph, replayed by all ranks at once."""
    for _ in range(2):
        exchange()
    torch.cuda.synchronize()
    barrier()
    graph = torch.cuda.CUDAGraph()
    # NCCL's watchdog asks for events from a thread of its own meanwhile, which another mode would take for a fault.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(layers):
            exchange()
    times = []
    for repeat in range(repeats + 2):
        torch.cuda.synchronize()
        barrier()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        if repeat >= 2:
            times.append(begin.elapsed_time(end) * 1e3 / layers)
    return statistics.median(times)
