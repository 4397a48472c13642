"""N instances as streams of one process on one GPU, with a stand-in for attention whose merged result is known."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from sgl_kernel_dcp import ExchangeShape, PeerExchange, StepMessage, StepTables, TableShape

from sglang_dcp.dataflow.merge import merge_partial_states
from sglang_dcp.dataflow.reference import route_tables

NUM_SLOTS = 96
NUM_ENTRIES = 64
POISON = -7.0


@dataclass(frozen=True)
class PreparedStep:
    """A step's messages on the device, with the indices that the expectation needs. -1: nothing there."""

    packed: list[torch.Tensor]  # per instance
    attention_index: torch.Tensor  # [n, S] flat (home, row) of each attention row
    merge_index: torch.Tensor  # [n, M, n] flat (shard, attention row) of each partial of a home row
    home_rows: torch.Tensor  # [n, M] bool
    kv_index: torch.Tensor  # [n, slots] flat (home, row) whose K/V arrives in the slot


def prepare_step(messages: list[StepMessage], group: DeviceGroup) -> PreparedStep:
    n, shape = group.num_instances, group.table_shape
    home, attention = shape.max_home_rows, shape.max_attention_rows
    attention_index = torch.full((n, attention), -1)
    merge_index = torch.full((n, home, n), -1)
    home_rows = torch.zeros(n, home, dtype=torch.bool)
    kv_index = torch.full((n, NUM_SLOTS), -1)
    packed = []
    for rank, message in enumerate(messages):
        tables = route_tables(message.routes, message.tails, rank)
        home_rows[rank, : len(message.routes[rank])] = True
        for slot, (h, m) in enumerate(tables.attention):
            attention_index[rank, slot] = h * home + m
        for m, sends in enumerate(tables.send):
            for j, (shard, slot) in enumerate(sends):
                merge_index[rank, m, j] = shard * attention + slot
        for row, line in zip(tables.attention, message.rows, strict=True):
            if line.kv_slot >= 0:
                kv_index[rank, line.kv_slot] = row[0] * home + row[1]
        packed.append(torch.from_numpy(group.tables[rank].pack(message)).cuda())
    return PreparedStep(packed, attention_index.cuda(), merge_index.cuda(), home_rows.cuda(), kv_index.cuda())


class DeviceGroup:
    """All instances and their static tensors. `rope_dim` > 0 sends queries and K/V as two parts."""

    def __init__(self, table_shape: TableShape, shape: ExchangeShape, *, rope_dim: int = 0, wait_limit_seconds: float = 20.0) -> None:
        n, self.table_shape, self.shape, self.rope_dim = table_shape.num_instances, table_shape, shape, rope_dim
        self.num_instances = n
        home, attention, heads = table_shape.max_home_rows, table_shape.max_attention_rows, shape.num_heads
        self.tables = [StepTables(table_shape, rank, NUM_ENTRIES, "cuda:0", shape.max_return_rows) for rank in range(n)]
        self.exchanges = [
            PeerExchange(rank, shape, self.tables[rank], num_sharing=n, wait_limit_seconds=wait_limit_seconds) for rank in range(n)
        ]
        for exchange in self.exchanges:
            exchange.connect([other.address for other in self.exchanges])
        self.streams = [torch.cuda.Stream() for _ in range(n)]
        like = {"dtype": torch.bfloat16, "device": "cuda:0"}
        self.query = torch.zeros(n, home, heads, shape.qk_head_dim, **like)
        self.kv = torch.zeros(n, home, 1, shape.kv_row_elements, **like)
        self.pool = torch.zeros(n, NUM_SLOTS, shape.kv_row_elements, **like)
        self.partial = torch.zeros(n, attention, heads, shape.v_head_dim, **like)
        self.lse = torch.zeros(n, attention, heads, dtype=torch.float32, device="cuda:0")
        self.shift = torch.randn(n, 1, 1, 1, device="cuda:0").to(torch.bfloat16)
        self.merged = torch.zeros(n, home, heads, shape.v_head_dim, **like)
        self.merged_lse = torch.zeros(n, home, heads, dtype=torch.float32, device="cuda:0")
        # The first launch of a kernel loads its code, which waits for the kernels that run: here they would wait for it.
        self.attend(0)
        torch.cuda.synchronize()

    def randomise(self) -> None:
        """New inputs, poisoned outputs; about one partial in eight is neutral (LSE -inf or +inf) and holds NaN."""
        self.query.normal_()
        self.kv.normal_()
        self.lse.normal_(std=4.0)
        chance = torch.rand(*self.lse.shape[:2], 1, device="cuda:0")
        self.lse.masked_fill_(chance < 0.125, float("-inf")).masked_fill_(chance < 0.0625, float("inf"))
        self.pool.fill_(POISON)
        self.partial.fill_(float("nan"))
        self.merged.fill_(float("nan"))
        self.merged_lse.fill_(float("nan"))

    def load(self, step: PreparedStep) -> None:
        for tables, packed in zip(self.tables, step.packed, strict=True):
            tables.buffer[: len(packed)].copy_(packed)

    def dispatch(self, rank: int, **options: int) -> None:
        split = self.shape.qk_head_dim - self.rope_dim
        kv_split = self.shape.kv_row_elements - (self.rope_dim or self.shape.kv_row_elements // 2)
        query, kv, pool = self.query[rank], self.kv[rank], self.pool[rank]
        self.exchanges[rank].dispatch(
            query[..., :split],
            query_rope=query[..., split:] if self.rope_dim else None,
            key=kv[..., :kv_split],
            value=kv[..., kv_split:],
            key_pool=pool[:, :kv_split],
            value_pool=pool[:, kv_split:],
            **options,
        )

    def attend(self, rank: int) -> None:
        """Stand-in: first elements of the query plus a shift; neutral rows keep their NaN."""
        rows = self.exchanges[rank].query_rows[..., : self.shape.v_head_dim]
        neutral = torch.isinf(self.lse[rank]).unsqueeze(-1)
        torch.add(rows, self.shift[rank], out=self.partial[rank])
        self.partial[rank].masked_fill_(neutral, float("nan"))

    def return_merge(self, rank: int, **options: int) -> None:
        self.exchanges[rank].return_merge(self.partial[rank], self.lse[rank], self.merged[rank], self.merged_lse[rank], **options)

    def exchange(self, ranks: list[int] | None = None, *, build: bool = True, layers: int = 1) -> None:
        """Every instance on its stream; the current stream waits for all. Capturable."""
        current = torch.cuda.current_stream()
        for rank in range(self.num_instances) if ranks is None else ranks:
            stream = self.streams[rank]
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                if build:
                    self.tables[rank].build()
                for _ in range(layers):
                    self.dispatch(rank)
                    self.attend(rank)
                    self.return_merge(rank)
        for rank in range(self.num_instances) if ranks is None else ranks:
            current.wait_stream(self.streams[rank])

    def violations(self, step: PreparedStep) -> torch.Tensor:
        """Device tensor of five numbers, all 0 when the exchange was right: query rows, pool, outputs (above tolerance), LSE, and rows
        written that nobody owns."""
        n, shape = self.num_instances, self.table_shape
        received = torch.stack([exchange.query_rows for exchange in self.exchanges])
        attended = step.attention_index >= 0
        wanted = self.query.flatten(0, 1)[step.attention_index.clamp_min(0)]
        wrong_rows = ((received != wanted).flatten(2).any(-1) & attended).sum()
        kv = self.kv.flatten(0, 1)[step.kv_index.clamp_min(0), 0]
        expected_pool = torch.where((step.kv_index >= 0).unsqueeze(-1), kv, torch.full_like(kv, POISON))
        wrong_pool = (self.pool != expected_pool).any(-1).sum()
        present = (step.merge_index >= 0).permute(2, 0, 1)
        index = step.merge_index.clamp_min(0).permute(2, 0, 1)
        sent = (wanted[..., : self.shape.v_head_dim] + self.shift).flatten(0, 1)
        lse = torch.where(present.unsqueeze(-1), self.lse.flatten(0, 1)[index], float("-inf"))
        lse = lse.masked_fill(lse == float("inf"), float("-inf"))
        expected = merge_partial_states(sent[index].float(), lse)
        rows = step.home_rows
        error = (self.merged.float() - expected.output).abs()
        bad_output = (~(error <= 0.02 + 0.01 * expected.output.abs())).flatten(2).any(-1) & rows
        both_neutral = (self.merged_lse == float("-inf")) & (expected.lse == float("-inf"))
        close = (self.merged_lse - expected.lse).abs() <= 2e-5 * (1 + expected.lse.abs())
        bad_lse = (~(close | both_neutral)).any(-1) & rows
        untouched = self.merged.isnan().flatten(2).all(-1) & self.merged_lse.isnan().all(-1)
        stray = ~untouched & ~rows
        assert received.shape[:2] == (n, shape.max_attention_rows)
        return torch.stack([wrong_rows, wrong_pool, bad_output.sum(), bad_lse.sum(), stray.sum()])

    def silent(self) -> list[dict[int, int]]:
        return [exchange.silent_peers() for exchange in self.exchanges]

    def close(self) -> None:
        torch.cuda.synchronize()
        for exchange in self.exchanges:
            exchange.close()
