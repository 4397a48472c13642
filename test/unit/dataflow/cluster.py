"""N instances in one process: their pools, random requests spread over them, and a transport over threads."""

from __future__ import annotations

import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from sglang_dcp.dataflow.attention.partial_attention import torch_partial_attention
from sglang_dcp.dataflow.attention_step import attention_step
from sglang_dcp.dataflow.contracts import NO_SCALES, GuestRow, HomeRow, NewKV, StepPlan
from sglang_dcp.dataflow.reference import partial_attention
from sglang_dcp.dataflow.step_plan import asks, build_step_plan
from sglang_dcp.mutants import install_mutant


class ThreadTransport:
    """All-to-all between threads of one exchange group; a peer that never comes breaks the barrier after 20 seconds."""

    def __init__(self, num_instances: int) -> None:
        self.barrier = threading.Barrier(num_instances, timeout=20)
        self.board: list = [None] * num_instances
        self.num_instances = num_instances

    def of(self, place: int) -> _Endpoint:
        return _Endpoint(self, place)


@dataclass
class _Endpoint:
    shared: ThreadTransport
    rank: int

    def all_to_all(self, message, send_splits, receive_splits, *, step, layer, stage):
        assert message.numel() == sum(send_splits)
        self.shared.board[self.rank] = message.split(list(send_splits))
        self.shared.barrier.wait()
        parts = [self.shared.board[source][self.rank] for source in range(self.shared.num_instances)]
        assert [part.numel() for part in parts] == list(receive_splits), (stage, self.rank)
        self.shared.barrier.wait()
        return torch.cat(parts)


@dataclass
class Request:
    home: int
    prefix_len: int
    num_new: int
    page_owners: np.ndarray
    page_numbers: np.ndarray
    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor


def as_bytes(rows: torch.Tensor) -> torch.Tensor:
    """torch indexes no 8-bit floats."""
    return rows.view(torch.uint8) if rows.itemsize == 1 else rows


class PoolCache:
    """One layer's pool. MLA (latent=True) keeps one row per token whose first v_head_dim elements are the value."""

    def __init__(self, slots: int, kv_heads: int, qk_dim: int, v_dim: int, latent: bool) -> None:
        self.keys = torch.full((slots, kv_heads, qk_dim), float("nan"))
        self.values = torch.full((slots, kv_heads, v_dim), float("nan"))
        self.qk_dim, self.v_dim, self.latent = qk_dim, v_dim, latent

    def write(self, slots, new_kv):
        assert new_kv.keys.dtype == self.keys.dtype, "what is stored comes in the pool's element type"
        as_bytes(self.keys)[slots] = as_bytes(new_kv.keys)
        if not self.latent:
            as_bytes(self.values)[slots] = as_bytes(new_kv.values)

    def keys_and_values(self):
        return self.keys, self.keys[..., : self.v_dim] if self.latent else self.values


class Cluster:
    """`heads` query heads over `kv_heads`; pools of `num_pages` pages (page 0 is padding)."""

    def __init__(self, seed: int, num_instances: int, page_size: int, latent: bool, num_pages: int = 64) -> None:
        install_mutant()
        self.rng, self.torch_rng = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
        self.num_instances, self.page_size, self.latent = num_instances, page_size, latent
        self.heads, self.kv_heads, self.qk_dim, self.v_dim = (4, 1, 24, 16) if latent else (4, 2, 16, 16)
        slots = (num_pages + 1) * page_size
        self.pools = [PoolCache(slots, self.kv_heads, self.qk_dim, self.v_dim, latent) for _ in range(num_instances)]
        self.free = [list(self.rng.permutation(np.arange(1, num_pages + 1))) for _ in range(num_instances)]
        self.requests: list[Request] = []
        self.scale, self.kv_scales = self.qk_dim**-0.5, NO_SCALES
        self.window: int | None = None
        self.sinks: torch.Tensor | None = None

    def randn(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.torch_rng)

    def add(self, home: int, prefix_len: int, num_new: int, owners: list[int]) -> Request:
        """`owners`: instance per page, enough for all tokens (more is allowed: pages ahead)."""
        total = prefix_len + num_new
        numbers = np.array([self.free[o].pop() for o in owners])
        keys = self.randn(total, self.kv_heads, self.qk_dim)
        values = keys[..., : self.v_dim] if self.latent else self.randn(total, self.kv_heads, self.v_dim)
        request = Request(home, prefix_len, num_new, np.array(owners), numbers, self.randn(num_new, self.heads, self.qk_dim), keys, values)
        for position in range(prefix_len):
            page = position // self.page_size
            slot = numbers[page] * self.page_size + position % self.page_size
            self.pools[owners[page]].write(torch.tensor([slot]), self.new_kv(request, slice(position, position + 1)))
        self.requests.append(request)
        return request

    def add_random_rows(self, count: int) -> None:
        """Random homes, lengths and page owners (any order, home or not), chunks and decodes, pages ahead of the sequence."""
        for _ in range(count):
            prefix_len = int(self.rng.integers(0, 6 * self.page_size))
            num_new = 1 if self.rng.random() < 0.5 else int(self.rng.integers(1, 3 * self.page_size))
            num_pages = -(-(prefix_len + num_new) // self.page_size) + int(self.rng.integers(0, 2))
            owners = [int(o) for o in self.rng.integers(0, self.num_instances, num_pages)]
            self.add(int(self.rng.integers(0, self.num_instances)), prefix_len, num_new, owners)

    def new_kv(self, request: Request, span: slice) -> NewKV:
        keys = request.keys[span]
        return NewKV(keys, keys[..., : self.v_dim] if self.latent else request.values[span], self.latent)

    def plan(self, rank: int) -> tuple[StepPlan, torch.Tensor, NewKV]:
        own = [r for r in self.requests if r.home == rank]
        guests = []
        for home in range(self.num_instances):
            for r in (r for r in self.requests if r.home == home != rank):
                mine = np.flatnonzero(r.page_owners == rank)
                if len(mine) and mine[0] * self.page_size < r.prefix_len + r.num_new:
                    guests.append(GuestRow(home, r.num_new, r.prefix_len, mine, r.page_numbers[mine]))
        rows, start = [], 0
        for r in own:
            rows.append(HomeRow(start, r.num_new, r.prefix_len, r.page_owners, r.page_numbers))
            start += r.num_new
        padding = 1 if not own else 0
        queries = torch.cat([r.query for r in own] + [self.randn(padding, self.heads, self.qk_dim)])
        keys = torch.cat([r.keys[r.prefix_len :] for r in own] + [self.randn(padding, self.kv_heads, self.qk_dim)])
        values = torch.cat([r.values[r.prefix_len :] for r in own] + [self.randn(padding, self.kv_heads, self.v_dim)])
        kv = NewKV(keys, keys[..., : self.v_dim] if self.latent else values, self.latent)
        plan = build_step_plan(0, rank, range(self.num_instances), self.page_size, len(queries), rows, guests, self.window)
        asking = any(asks(r.num_new, r.prefix_len) for r in self.requests)
        return dataclasses.replace(plan, anybody_asks=asking), queries, kv

    def run(self, attend=None) -> list[torch.Tensor]:
        """Every instance's output. attend: an attention per instance; plain torch by default."""
        attend = attend or [torch_partial_attention] * self.num_instances
        transport = ThreadTransport(self.num_instances)

        def work(rank: int) -> torch.Tensor:
            plan, queries, kv = self.plan(rank)
            given = {"scale": self.scale, "kv_scales": self.kv_scales, "layer": 0, "sinks": self.sinks}
            return attention_step(queries, kv, plan, self.pools[rank], attend[rank], transport.of(rank), **given)

        with ThreadPoolExecutor(self.num_instances) as pool:
            return list(pool.map(work, range(self.num_instances)))

    def expected(self, rank: int) -> torch.Tensor:
        parts = []
        for r in (r for r in self.requests if r.home == rank):
            positions = torch.arange(r.prefix_len + r.num_new)
            at = {"query_positions": positions[r.prefix_len :], "key_positions": positions, "window": self.window}
            state = partial_attention(r.query, r.keys, r.values, scale=self.scale, **at)
            # One more column of the softmax: what a sink is, in the papers' words.
            share = torch.ones_like(state.lse) if self.sinks is None else state.lse.exp() / (state.lse.exp() + self.sinks.exp())
            parts.append(state.output * share.unsqueeze(-1))
        return torch.cat(parts) if parts else torch.zeros(1, self.heads, self.v_dim)
