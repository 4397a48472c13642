"""Partial attention of a step through paged kernels that split planning (host, once per step) from running (every layer)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from sglang_dcp.dataflow.attention.kernel_table import KernelTable, kernel_table
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

    def plan(self, table: KernelTable, page_indices: torch.Tensor, *, causal: bool) -> None:
        """page_indices: the table's, on the device. May run while kernels of the plan before still wait for the device."""
        ...

    def run(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, out: PartialState | None) -> PartialState:
        """queries [q, heads, qk_head_dim] in the table's order; keys, values [pages, page_size, kv_heads, dim]. The result is the
        caller's; it lies in `out` where that is given."""
        ...


KernelFactory = Callable[[AttentionShape, int, torch.device], PagedKernel]
"""Builds a kernel for (shape, page size, device)."""


@dataclass
class _Part:
    kernel: PagedKernel
    page_size: int
    planned_rows: Sequence[AttentionRow] | None = None


class PagedPartialAttention:
    """A `PartialAttention`. Plans when it meets a new step's rows, that is in the step's first layer. One kernel for rows over the pool,
    one for causal rows over the step's own tokens."""

    def __init__(self, page_size: int, make_kernel: KernelFactory) -> None:
        self._page_size, self._make_kernel = page_size, make_kernel
        self._shape: AttentionShape | None = None
        self._parts: dict[bool, _Part] = {}

    def __call__(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        rows: Sequence[AttentionRow],
        scale: float,
        out: PartialState | None = None,
    ) -> PartialState:
        self._prepare(queries, keys, values, scale)
        part = self._parts[rows[0].causal]
        if rows is not part.planned_rows:
            table = kernel_table(rows, part.page_size)
            if table.num_queries != len(queries):
                raise ValueError(f"attention rows of {table.num_queries} queries were given {len(queries)}")
            part.kernel.plan(table, to_device(torch.from_numpy(table.page_indices), queries.device), causal=rows[0].causal)
            part.planned_rows = rows
        paged_keys, paged_values = (cache.unflatten(0, (-1, part.page_size)) for cache in (keys, values))
        return part.kernel.run(queries, paged_keys, paged_values, out)

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
        for causal, page_size in ((False, self._page_size), (True, 1)):
            self._parts[causal] = _Part(self._make_kernel(shape, page_size, queries.device), page_size)
