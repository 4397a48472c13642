"""Dispatch, return and merge among instances of one process, on one GPU and, where there are two, over NVLink.

On one GPU in two ways: all instances in one launch (two nodes per exchange, as each of N GPUs would see it; the launch deals all
instances' work to all multiprocessors), and each instance on its own branch of the graph (2 N nodes, whose launches follow each other
on the one GPU, each on its share of the multiprocessors).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from sgl_kernel_dcp import ExchangeShape, PeerExchange, RowLine, StepMessage, StepTables, TableShape, launch_together

from benchmark.kernels.timing import Row
from sglang_dcp.dataflow.measure.timing import event_times, graph_microseconds
from sglang_dcp.dataflow.reference import route_tables

LAYERS = 30
V3_SHAPE = ExchangeShape(128, 576, 512, 576, 64)
V3_BEFORE_ABSORPTION = ExchangeShape(128, 192, 128, 576, 64)
QWEN_SHAPE = ExchangeShape(64, 128, 128, 1024, 64)


@dataclass(frozen=True)
class Setting:
    name: str
    shape: ExchangeShape
    home_rows: tuple[int, ...]  # rows of each instance; every row has a shard on every instance
    key: str = ""


SPREAD, ONE_HOME = (2, 2, 2, 2), (8, 0, 0, 0)
SETTINGS = (
    Setting("V3, 8 rows (2 of each home) on 4 shards", V3_SHAPE, SPREAD, "exchange"),
    Setting("V3, 8 rows of one home on 4 shards", V3_SHAPE, ONE_HOME, "exchange_one_home"),
    Setting("V3, 8 rows of one home on 2 shards", V3_SHAPE, (8, 0)),
    Setting("V3, 8 rows, no remote shard", V3_SHAPE, (8,)),
    Setting("V3 before absorption, 8 rows (2 of each home) on 4 shards", V3_BEFORE_ABSORPTION, SPREAD, "exchange_before_absorption"),
    Setting("V3 before absorption, 8 rows of one home on 4 shards", V3_BEFORE_ABSORPTION, ONE_HOME),
    Setting("Qwen3 GQA, 8 rows (2 of each home) on 4 shards", QWEN_SHAPE, SPREAD, "exchange_gqa"),
    Setting("Qwen3 GQA, 8 rows of one home on 4 shards", QWEN_SHAPE, ONE_HOME),
    Setting("Qwen3 GQA, 1 row on 2 shards", QWEN_SHAPE, (1, 0)),
    Setting("no rows, 4 instances", V3_SHAPE, (0, 0, 0, 0)),
)


def message_bytes(setting: Setting) -> int:
    """Bytes read plus written by all instances: each query read once and written per shard, each remote partial and LSE read, written
    and read again, each own one read, each result written."""
    shape, shards, rows = setting.shape, len(setting.home_rows), sum(setting.home_rows)
    query = shape.num_heads * shape.qk_head_dim * 2
    output = shape.num_heads * shape.v_head_dim * 2
    partial = output + shape.num_heads * 4
    return rows * (query * (1 + shards) + (shards - 1) * 2 * partial + shards * partial + output)


class Group:
    """N connected instances with their static tensors. No attention runs between: the stages themselves are measured."""

    def __init__(self, setting: Setting, *, early_launch: bool, num_gpus: int = 1, num_sharing: int | None = None) -> None:
        """num_sharing: instances on a GPU, those of other groups included; None: this group's alone."""
        n, shape = len(setting.home_rows), setting.shape
        devices = [f"cuda:{rank % num_gpus}" for rank in range(n)]
        table_shape = TableShape(n, 16, 32, 8, 64, 2, 64)
        routes = [[list(range(n))] * rows for rows in setting.home_rows]
        tails = [[-1] * rows for rows in setting.home_rows]
        self.tables = [StepTables(table_shape, rank, 32, devices[rank], shape.max_return_rows) for rank in range(n)]
        options = {"num_sharing": num_sharing or n // num_gpus, "wait_limit_seconds": 10.0, "early_launch": early_launch}
        self.exchanges = [PeerExchange(rank, shape, self.tables[rank], **options) for rank in range(n)]
        for rank, exchange in enumerate(self.exchanges):
            exchange.connect([other.address for other in self.exchanges])
            attended = route_tables(routes, tails, rank).attention
            with torch.cuda.device(devices[rank]):
                self.tables[rank].upload(StepMessage(routes, tails, [RowLine(i, 64) for i in range(len(attended))]))
                self.tables[rank].build()
        self.query, self.partial, self.lse, self.merged, self.streams = [], [], [], [], []
        for device in devices:
            like = {"dtype": torch.bfloat16, "device": device}
            self.query.append(torch.randn(16, shape.num_heads, shape.qk_head_dim, **like))
            self.partial.append(torch.randn(32, shape.num_heads, shape.v_head_dim, **like))
            self.lse.append(torch.randn(32, shape.num_heads, device=device))
            self.merged.append(torch.zeros(16, shape.num_heads, shape.v_head_dim, **like))
            self.streams.append(torch.cuda.Stream(device))
        self.devices = devices
        torch.cuda.synchronize()

    def layers_of(self, rank: int) -> None:
        for _ in range(LAYERS):
            self.exchanges[rank].dispatch(self.query[rank])
            self.exchanges[rank].return_merge(self.partial[rank], self.lse[rank], self.merged[rank])

    def layers_together(self) -> None:
        for _ in range(LAYERS):
            with launch_together(self.exchanges[0]):
                for rank, exchange in enumerate(self.exchanges):
                    exchange.dispatch(self.query[rank])
            with launch_together(self.exchanges[0]):
                for rank, exchange in enumerate(self.exchanges):
                    exchange.return_merge(self.partial[rank], self.lse[rank], self.merged[rank])

    def layers_on_branches(self) -> None:
        current = torch.cuda.current_stream()
        self.fork(current)
        self.join(current)

    def fork(self, current: torch.cuda.Stream) -> None:
        """Every instance's layers on a stream of its own, behind what `current` has."""
        for rank, stream in enumerate(self.streams):
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                self.layers_of(rank)

    def join(self, current: torch.cuda.Stream) -> None:
        for stream in self.streams:
            current.wait_stream(stream)

    def microseconds(self, layers: Callable[[], None]) -> float:
        """One exchange, as one of LAYERS in one graph."""
        layers()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            layers()
        return self.checked(event_times(graph.replay, 40))

    def microseconds_apart(self) -> float:
        """The same with a GPU and a graph for each instance, seen by the first."""
        graphs = []
        for rank, device in enumerate(self.devices):
            with torch.cuda.device(device):
                self.layers_of(rank)  # ends when the others have run it too
        torch.cuda.synchronize()
        for rank, device in enumerate(self.devices):
            with torch.cuda.device(device):
                graphs.append(torch.cuda.CUDAGraph())
                with torch.cuda.graph(graphs[rank], stream=self.streams[rank]):
                    self.layers_of(rank)

        def replay() -> None:
            for device, graph in reversed(list(zip(self.devices, graphs, strict=True))):
                with torch.cuda.device(device):
                    graph.replay()

        return self.checked(event_times(replay, 40))

    def checked(self, times: list[float]) -> float:
        silent = [exchange.silent_peers() for exchange in self.exchanges]
        if any(silent):
            raise RuntimeError(f"peers went silent while being timed: {silent}")
        return statistics.median(times) * 1000 / LAYERS


def absorption(num_rows: int) -> Row:
    """What the small payload moves from home to the shards: the query's product with W_UK and the output's with W_UV, per head."""
    like = {"dtype": torch.bfloat16, "device": "cuda:0"}
    query, up_key = torch.randn(128, num_rows, 128, **like), torch.randn(128, 128, 512, **like)
    latent, up_value = torch.randn(128, num_rows, 512, **like), torch.randn(128, 512, 128, **like)
    absorbed, output = torch.empty(128, num_rows, 512, **like), torch.empty(128, num_rows, 128, **like)

    def both() -> None:
        torch.bmm(query, up_key, out=absorbed)
        torch.bmm(latent, up_value, out=output)

    note = "at home, or at every shard with the small payload"
    return Row(f"W_UK and W_UV products, {num_rows} rows", graph_microseconds([both]), note=note)


def measure(bandwidth: float) -> tuple[list[Row], dict[str, float]]:
    rows, keys = [], {}
    for setting in SETTINGS:
        moved = message_bytes(setting)
        at_bandwidth = moved / bandwidth * 1e6
        for early_launch in (True, False):
            group = Group(setting, early_launch=early_launch)
            ways = [("", group.layers_together)] + ([] if early_launch else [("_branches", group.layers_on_branches)])
            for way, layers in ways:
                microseconds = group.microseconds(layers)
                note = f"{microseconds - at_bandwidth:.2f} us beyond the bytes; {'branches' if way else 'one launch'}"
                note += ", launched early" if early_launch else ""
                rows.append(Row(f"exchange {setting.name}", microseconds, moved, note))
                if setting.key and (early_launch or way):
                    keys[f"{setting.key}_total{way}_us"] = microseconds
                    keys[f"{setting.key}_fixed{way}_us"] = microseconds - at_bandwidth
            for exchange in group.exchanges:
                exchange.close()
    rows += [absorption(8), absorption(64)]
    if torch.cuda.device_count() > 1:
        rows += measure_two_gpus(keys)
    return rows, keys


def link_bandwidth() -> float:
    """Bytes per second of a large copy from one GPU to another. Also has torch open peer access both ways."""
    first, second = (torch.empty(1 << 28, dtype=torch.uint8, device=f"cuda:{index}") for index in range(2))
    first.copy_(second)
    return first.numel() / (statistics.median(event_times(lambda: second.copy_(first), 10)) * 1e-3)


def measure_two_gpus(keys: dict[str, float]) -> list[Row]:
    """Beyond the bytes over the link: those that one GPU sends in one direction."""
    bandwidth = link_bandwidth()
    rows = [Row("copy between two GPUs, 256 MiB", (1 << 28) / bandwidth * 1e6)]
    for name, shape, key in (("V3", V3_SHAPE, "exchange_two_gpus"), ("Qwen3 GQA", QWEN_SHAPE, "exchange_gqa_two_gpus")):
        for home_rows in ((4, 4), (1, 1), (0, 0)):
            group = Group(Setting(name, shape, home_rows), early_launch=True, num_gpus=2)
            microseconds = group.microseconds_apart()
            sent = home_rows[0] * shape.num_heads * (shape.qk_head_dim * 2 + shape.v_head_dim * 2 + 8)
            fixed = microseconds - sent / bandwidth * 1e6
            label = f"exchange {name}, {home_rows[0]} rows of each on two GPUs"
            rows.append(Row(label, microseconds, note=f"{fixed:.2f} us beyond the bytes"))
            if home_rows[0] == 4:
                keys |= {f"{key}_total_us": microseconds, f"{key}_fixed_us": fixed}
            for exchange in group.exchanges:
                exchange.close()
    return rows
