"""Times on the device: CUDA events around replays of a graph, medians of many."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch


def event_times(action: Callable[[], object], repeats: int) -> list[float]:
    """Milliseconds of each of `repeats` runs, after three warm-ups."""
    for _ in range(3):
        action()
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        action()
        end.record()
        times.append((begin, end))
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in times]


def graph_microseconds(actions: list[Callable[[], object]], *, nodes: int = 24, repeats: int = 40) -> float:
    """Median time of one action, as one of `nodes` that follow each other in one graph; several actions take turns (several input sets)."""
    for action in actions:
        action()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for node in range(nodes):
            actions[node % len(actions)]()
    return statistics.median(event_times(graph.replay, repeats)) * 1000 / nodes
