"""One rank of the exchange over peer memory: sgl-kernel-dcp between processes, one per GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmark.multi_gpu.clocks import DeviceClock, graph_time, stage_times
from benchmark.multi_gpu.collective_rank import RankResult, join_group
from benchmark.multi_gpu.exchange_cases import ExchangeCase, RowShape

TOKENS_PER_ROW = 64
CHECK_TOLERANCE = 0.04
"""bfloat16 values up to about 5, merged from equal parts."""


def measure_peer(rank: int, num_ranks: int, folder: Path, cases: list[ExchangeCase], layers: int, repeats: int) -> list[RankResult]:
    """One exchange per row shape, large enough for all of its cases; tables are uploaded per case."""
    join_group(rank, num_ranks, folder)
    torch.cuda.set_device(rank)
    results: dict[int, RankResult] = {}
    for shape in dict.fromkeys(case.shape for case in cases):
        mine = [(index, case) for index, case in enumerate(cases) if case.shape == shape]
        member = PeerMember(rank, num_ranks, shape, max(max(case.home_rows) for _, case in mine))
        for index, case in mine:
            results[index] = member.measure(case, layers, repeats)
        member.close()
    dist.barrier()
    return [results[index] for index in range(len(cases))]


class PeerMember:
    """This rank's buffers and its connection to all others, through CUDA IPC handles."""

    def __init__(self, rank: int, num_ranks: int, shape: RowShape, max_rows: int) -> None:
        from sgl_kernel_dcp import ExchangeShape, PeerExchange, StepTables, TableShape

        self.rank, self.shape = rank, shape
        device = torch.device("cuda", rank)
        attention_rows = max_rows * num_ranks
        max_return = max(1, max_rows * (num_ranks - 1))
        table_shape = TableShape(num_ranks, max_rows, attention_rows, 8, attention_rows, 2, TOKENS_PER_ROW)
        exchange_shape = ExchangeShape(shape.num_heads, shape.qk_head_dim, shape.v_head_dim, shape.kv_row_elements, max_return)
        self.tables = StepTables(table_shape, rank, attention_rows, device, max_return)
        self.exchange = PeerExchange(rank, exchange_shape, self.tables)
        handles: list[Any] = [None] * num_ranks
        dist.all_gather_object(handles, self.exchange.ipc_handle())
        self.exchange.connect_processes(handles)
        like = {"dtype": torch.bfloat16, "device": device}
        self.query = torch.randn(max_rows, shape.num_heads, shape.qk_head_dim, device=device).to(torch.bfloat16)
        self.partial = torch.zeros(attention_rows, shape.num_heads, shape.v_head_dim, **like)
        self.lse = torch.zeros(attention_rows, shape.num_heads, device=device)
        self.merged = torch.zeros(max_rows, shape.num_heads, shape.v_head_dim, **like)
        torch.cuda.synchronize()
        dist.barrier()

    def load(self, case: ExchangeCase) -> None:
        from sgl_kernel_dcp import RowLine, StepMessage

        routes = case.routes()
        num_rows = sum(self.rank in shards for home in routes for shards in home)
        tails = [[-1] * rows for rows in case.home_rows]
        self.tables.upload(StepMessage(routes, tails, [RowLine(entry, TOKENS_PER_ROW) for entry in range(num_rows)]))
        self.tables.build()

    def dispatch(self) -> None:
        self.exchange.dispatch(self.query)

    def give_back(self) -> None:
        self.exchange.return_merge(self.partial, self.lse, self.merged)

    def check(self, case: ExchangeCase) -> None:
        rows = case.home_rows[self.rank]
        self.merged.fill_(float("nan"))
        self.dispatch()
        self.partial.copy_(self.exchange.query_rows[..., : self.shape.v_head_dim])
        self.give_back()
        torch.cuda.synchronize()
        if silent := self.exchange.silent_peers():
            raise RuntimeError(f"rank {self.rank}: peers did not answer (peer: exchange) {silent}")
        if rows:
            worst = float((self.merged[:rows].float() - self.query[:rows, :, : self.shape.v_head_dim].float()).abs().max())
            if not worst <= CHECK_TOLERANCE:
                raise RuntimeError(f"rank {self.rank}: a merged row is off by {worst:.3g}, more than {CHECK_TOLERANCE}")

    def measure(self, case: ExchangeCase, layers: int, repeats: int) -> RankResult:
        torch.cuda.synchronize()
        dist.barrier()
        self.load(case)
        self.check(case)
        stages: list[Callable[[], Any]] = [self.dispatch, self.give_back]
        times = stage_times(DeviceClock(), stages, dist.barrier, layers=layers, repeats=repeats)
        found = {"dispatch_us": times[0], "return_us": times[1], "total_us": sum(times), "merge_us": self.merge_alone(case)}

        def exchange() -> None:
            self.dispatch()
            self.give_back()

        found["graph_us"] = graph_time(exchange, dist.barrier, layers=layers, repeats=repeats)
        if silent := self.exchange.silent_peers():
            raise RuntimeError(f"rank {self.rank}: peers went silent while being timed {silent}")
        return RankResult(found, {})

    def merge_alone(self, case: ExchangeCase) -> float:
        """The merge kernel over partials that are all here. In the exchange it is part of the return."""
        from sgl_kernel_dcp import merge_stacked

        rows = max(1, case.home_rows[self.rank])
        outputs = self.partial.new_zeros(case.degree, rows, self.shape.num_heads, self.shape.v_head_dim)
        lses = self.lse.new_zeros(case.degree, rows, self.shape.num_heads)
        return graph_time(lambda: merge_stacked(outputs, lses, self.merged[:rows]), lambda: None, layers=24, repeats=10)

    def close(self) -> None:
        torch.cuda.synchronize()
        dist.barrier()
        self.exchange.close()
        dist.barrier()
