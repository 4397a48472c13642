"""Times on the device: CUDA events around replays of a graph, medians of many."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

COPY_BYTES = 1 << 30


@dataclass(frozen=True)
class Row:
    """One line of the table. bytes: read plus written; 0 where bytes are not the point."""

    name: str
    microseconds: float
    bytes: int = 0
    note: str = ""

    def share(self, copy_bandwidth: float) -> float:
        """Share of the measured copy bandwidth (bytes per second)."""
        return self.bytes / (self.microseconds * 1e-6) / copy_bandwidth


def event_times(action: Callable[[], None], repeats: int) -> list[float]:
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


def graph_microseconds(actions: list[Callable[[], None]], *, nodes: int = 24, repeats: int = 40) -> float:
    """Median time of one action, as one of `nodes` that follow each other in one graph; several actions take turns (several input sets)."""
    for action in actions:
        action()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for node in range(nodes):
            actions[node % len(actions)]()
    return statistics.median(event_times(graph.replay, repeats)) * 1000 / nodes


def copy_bandwidth() -> float:
    """Bytes per second of a large device copy, read plus written."""
    source = torch.empty(COPY_BYTES // 4, dtype=torch.float32, device="cuda").normal_()
    target = torch.empty_like(source)
    milliseconds = statistics.median(event_times(lambda: target.copy_(source), 20))
    return 2 * COPY_BYTES / (milliseconds * 1e-3)


def print_table(rows: list[Row], bandwidth: float) -> None:
    print(f"{'kernel':64} {'us':>9} {'MB':>9} {'of copy':>8}  note")
    for row in rows:
        moved, share = (f"{row.bytes / 1e6:9.2f}", f"{row.share(bandwidth):8.2f}") if row.bytes else (" " * 9, " " * 8)
        print(f"{row.name:64} {row.microseconds:9.2f} {moved} {share}  {row.note}")
