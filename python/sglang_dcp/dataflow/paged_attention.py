"""Partial attention of a step through paged kernels that split planning (host, once per step) from running (every layer)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from sglang_dcp.dataflow.attention_spans import SpanTable, span_tables
from sglang_dcp.dataflow.contracts import AttentionRow, PartialState
from sglang_dcp.dataflow.device_plan import to_device


@dataclass(frozen=True)
class AttentionShape:
    """What the kernels of a model are planned for. latent: MLA in absorbed form, one K/V head whose value is a part of its key."""

    num_heads: int
    num_kv_heads: int
    qk_head_dim: int
    v_head_dim: int
    dtype: torch.dtype
    scale: float
    latent: bool


class PagedKernel(Protocol):
    """One kernel with its own plan."""

    def plan(self, table: SpanTable, page_indices: torch.Tensor, *, causal: bool) -> None:
        """page_indices: the table's, on the device. May run while kernels of the plan before still wait for the device."""
        ...

    def run(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> PartialState:
        """queries [q, heads, qk_head_dim] in the table's order; keys, values [pages, page_size, kv_heads, dim]."""
        ...


KernelFactory = Callable[[AttentionShape, int, torch.device], PagedKernel]
"""Builds a kernel for (shape, page size, device)."""


@dataclass
class _Part:
    kernel: PagedKernel
    queries: torch.Tensor | None = None
    everything: bool = False


class PagedPartialAttention:
    """A `PartialAttention`. Plans when it meets a new step's rows, that is in the step's first layer."""

    def __init__(self, page_size: int, make_kernel: KernelFactory) -> None:
        self._page_size, self._make_kernel = page_size, make_kernel
        self._shape: AttentionShape | None = None
        self._planned_rows: Sequence[AttentionRow] | None = None
        self._unmasked: _Part
        self._causal: _Part

    def __call__(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, rows: Sequence[AttentionRow], scale: float
    ) -> PartialState:
        self._prepare(queries, keys, values, scale)
        if rows is not self._planned_rows:
            self._plan(rows, queries)
        num_queries, num_heads, _ = queries.shape
        state: PartialState | None = None
        for part in (self._unmasked, self._causal):
            if part.queries is None:
                continue
            got = part.kernel.run(queries if part.everything else queries[part.queries], self._paged(keys), self._paged(values))
            if part.everything:
                return PartialState(got.output.float(), got.lse)
            if state is None:
                state = self._neutral(num_queries, num_heads, values)
            state.output[part.queries] = got.output.float()
            state.lse[part.queries] = got.lse
        return state or self._neutral(num_queries, num_heads, values)

    def _prepare(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> None:
        num_kv_heads, qk_head_dim = keys.shape[1:]
        shape = AttentionShape(
            num_heads=queries.shape[1],
            num_kv_heads=num_kv_heads,
            qk_head_dim=qk_head_dim,
            v_head_dim=values.shape[-1],
            dtype=queries.dtype,
            scale=scale,
            latent=num_kv_heads == 1 and values.shape[-1] != qk_head_dim,
        )
        if shape == self._shape:
            return
        if self._shape is not None:
            raise ValueError(f"paged attention is planned once per step for all layers, but layers differ: {self._shape} and {shape}")
        self._shape = shape
        self._unmasked, self._causal = (_Part(self._make_kernel(shape, self._page_size, queries.device)) for _ in range(2))

    def _plan(self, rows: Sequence[AttentionRow], queries: torch.Tensor) -> None:
        unmasked, causal = span_tables(rows, self._page_size)
        for part, table in ((self._unmasked, unmasked), (self._causal, causal)):
            part.queries, part.everything = None, False
            if not len(table):
                continue
            indices = torch.from_numpy(table.queries)
            part.everything = len(indices) == len(queries) and bool((indices == torch.arange(len(queries))).all())
            part.queries = to_device(indices, queries.device)
            part.kernel.plan(table, to_device(torch.from_numpy(table.page_indices), queries.device), causal=part is self._causal)
        self._planned_rows = rows

    def _paged(self, cache: torch.Tensor) -> torch.Tensor:
        return cache.unflatten(0, (-1, self._page_size))

    @staticmethod
    def _neutral(num_queries: int, num_heads: int, values: torch.Tensor) -> PartialState:
        return PartialState.neutral(num_queries, num_heads, v_head_dim=values.shape[-1], dtype=torch.float32, device=values.device)
