"""One rank of the exchange over a process group: the runtime's own dispatch, return and merge, over NCCL or gloo."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmark.multi_gpu.clocks import DeviceClock, HostClock, graph_time, stage_times
from benchmark.multi_gpu.exchange_cases import ExchangeCase, step_plan
from sglang_dcp.dataflow.attention_step import nothing
from sglang_dcp.dataflow.contracts import NewKV, PartialState
from sglang_dcp.dataflow.device_plan import plan_on_device
from sglang_dcp.dataflow.dispatch import Received, dispatch, return_partials
from sglang_dcp.dataflow.merge import merge_into
from sglang_dcp.dataflow.transport.base import Transport
from sglang_dcp.dataflow.transport.gloo import GlooTransport, create_gloo_group
from sglang_dcp.dataflow.transport.nccl import NcclTransport, create_nccl_group

GROUP_TIMEOUT_S = 60.0


@dataclass
class RankResult:
    """Microseconds of one case on one rank; notes: what could not be measured, and why."""

    stages: dict[str, float]
    notes: dict[str, str]


def join_group(rank: int, num_ranks: int, folder: Path) -> None:
    """The gloo group of all ranks, for barriers and handles."""
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=num_ranks, timeout=timedelta(seconds=GROUP_TIMEOUT_S)
    )


def measure_collective(
    rank: int, num_ranks: int, folder: Path, kind: str, cases: list[ExchangeCase], layers: int, repeats: int
) -> list[RankResult]:
    """kind: "nccl" (GPU `rank`) or "gloo" (CPU)."""
    join_group(rank, num_ranks, folder)
    torch.set_num_threads(1)
    everybody = [range(num_ranks)]
    if kind == "nccl":
        torch.cuda.set_device(rank)
        transport: Transport = NcclTransport(create_nccl_group(GROUP_TIMEOUT_S, everybody))
        device = torch.device("cuda", rank)
    else:
        transport, device = GlooTransport(create_gloo_group(GROUP_TIMEOUT_S, everybody)), torch.device("cpu")
    results = [CollectiveExchange(case, rank, device, transport).measure(layers, repeats) for case in cases]
    dist.barrier()
    if kind == "gloo":  # NCCL's may wait for a peer; the process ends when its results are read
        dist.destroy_process_group()
    return results


class CollectiveExchange:
    """One layer's exchange of one case. The stand-in for attention gives each query's first elements back, so the merge is known."""

    def __init__(self, case: ExchangeCase, rank: int, device: torch.device, transport: Transport) -> None:
        self.rank, self.rows, self.device, self.transport = rank, case.home_rows[rank], device, transport
        self.plan = plan_on_device(step_plan(case, rank), device)
        shape, self.v_dim = case.shape, case.shape.v_head_dim
        # gloo does not move bfloat16.
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        generator = torch.Generator().manual_seed(1000 + rank)
        self.query = torch.randn(self.plan.num_tokens, shape.num_heads, shape.qk_head_dim, generator=generator).to(device, dtype)
        # No K/V travels in these cases.
        keys = torch.zeros(self.plan.num_tokens, 1, shape.kv_row_elements, device=device, dtype=dtype)
        self.new_kv = NewKV(keys, keys, latent=True)
        self.own = self.partial_of(self.plan.num_tokens, shape.num_heads, dtype)
        self.guests = self.partial_of(self.plan.num_received, shape.num_heads, dtype)
        self.received: Received | None = None
        self.returned: list[PartialState] = []

    def partial_of(self, rows: int, heads: int, dtype: torch.dtype) -> PartialState:
        return PartialState(
            torch.zeros(rows, heads, self.v_dim, device=self.device, dtype=dtype), torch.zeros(rows, heads, device=self.device)
        )

    def dispatch(self) -> None:
        self.received = dispatch(self.query, self.new_kv, self.plan, self.transport, layer=0)

    def give_back(self) -> None:
        self.returned = return_partials(self.guests, self.plan, self.transport, layer=0, dtype=self.query.dtype)

    def merge(self) -> None:
        """In place: the own partials of the next exchange are merged ones, which costs the same."""
        if len(self.plan.merges):
            merge_into(self.own, self.plan.merges, nothing(self.own), self.returned)

    def check(self) -> None:
        """One exchange with the stand-in: every row must come back as it left."""
        self.dispatch()
        assert self.received is not None
        # An own partial unlike what comes back, of equal weight: the merge must show in the result.
        self.own.output.copy_(self.query[..., : self.v_dim]).neg_()
        self.guests.output.copy_(self.received.queries[..., : self.v_dim])
        self.give_back()
        self.merge()
        num_shards = sum(len(tokens) > 0 for tokens in self.plan.send_queries)
        expected = self.query[..., : self.v_dim].float() * (num_shards - 1) / (num_shards + 1)
        worst = float((self.own.output.float() - expected).abs().max())
        limit = 0.02 * max(1, num_shards)
        if not worst <= limit:
            raise RuntimeError(f"rank {self.rank}: a merged row is off by {worst:.3g}, more than {limit:g}")

    def measure(self, layers: int, repeats: int) -> RankResult:
        self.check()
        stages: list[Callable[[], Any]] = [self.dispatch, self.give_back, self.merge]
        clock = HostClock() if self.device.type == "cpu" else DeviceClock()
        times = stage_times(clock, stages, dist.barrier, layers=layers, repeats=repeats)
        found = dict(zip(("dispatch_us", "return_us", "merge_us"), times, strict=True)) | {"total_us": sum(times)}
        notes = {}
        if self.device.type == "cuda":
            try:
                found["graph_us"] = graph_time(lambda: [stage() for stage in stages] and None, dist.barrier, layers=layers, repeats=repeats)
            except RuntimeError as error:
                notes["graph"] = f"not captured: {error}"[:300]
        return RankResult(found, notes)
