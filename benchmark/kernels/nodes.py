"""Exchanges of two nodes of two instances on one GPU, at once, over those of one such node.

Every instance has a quarter of the multiprocessors, in both: what is told apart is whether one node's exchange knows of the other's.
"""

from __future__ import annotations

import statistics

import torch

from benchmark.kernels.exchange import LAYERS, QWEN_SHAPE, V3_SHAPE, Group, Setting
from benchmark.kernels.timing import event_times

NODES, ROWS, ROUNDS = 2, (4, 4), 7
SHAPES = {"mla": V3_SHAPE, "gqa": QWEN_SHAPE}


class Nodes:
    """Groups that are connected each in itself. Every instance is a branch of the graph."""

    def __init__(self, setting: Setting) -> None:
        instances = NODES * len(setting.home_rows)
        self.groups = [Group(setting, early_launch=False, num_sharing=instances) for _ in range(NODES)]

    def captured(self, groups: list[Group]) -> torch.cuda.CUDAGraph:
        def layers() -> None:
            current = torch.cuda.current_stream()
            for group in groups:
                group.fork(current)
            for group in groups:
                group.join(current)

        layers()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            layers()
        return graph

    def measure(self) -> tuple[float, float]:
        """Microseconds of an exchange of the first node alone, and of both at once. In turns; medians over the rounds."""
        one, both = self.captured(self.groups[:1]), self.captured(self.groups)
        times: dict[torch.cuda.CUDAGraph, list[float]] = {one: [], both: []}
        for _ in range(ROUNDS):
            for graph, found in times.items():
                found.append(statistics.median(event_times(graph.replay, 40)) * 1000 / LAYERS)
        silent = [exchange.silent_peers() for group in self.groups for exchange in group.exchanges]
        if any(silent):
            raise RuntimeError(f"peers went silent while being timed: {silent}")
        return statistics.median(times[one]), statistics.median(times[both])

    def close(self) -> None:
        for group in self.groups:
            for exchange in group.exchanges:
                exchange.close()


def measure_nodes() -> dict[str, dict[str, float]]:
    """By kind of attention: exchange_2_us, exchange_2x2_us, exchange_2x2_over_2. Four rows of each home, a shard on both of its node."""
    found = {}
    for name, shape in SHAPES.items():
        nodes = Nodes(Setting(name, shape, ROWS))
        two, both = nodes.measure()
        nodes.close()
        found[name] = {"exchange_2_us": round(two, 3), "exchange_2x2_us": round(both, 3), "exchange_2x2_over_2": round(both / two, 4)}
    return found
