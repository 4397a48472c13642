"""Partial attention of a step through paged kernels that split planning (host, once per step) from running (every layer)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from sglang_dcp.dataflow.attention.kernel_table import KernelTable, kernel_table
from sglang_dcp.dataflow.contracts import NO_SCALES, AttentionRow, KVScales, PartialState
from sglang_dcp.dataflow.device_plan import to_device
from sglang_dcp.dataflow.window import chunk_row, pool_rows


@dataclass(frozen=True)
class AttentionShape:
    """What the kernels of a model are planned for. latent: MLA in absorbed form, one K/V head whose value is a part of its key.
    quantised: element type of the K/V where it is not dtype."""

    num_heads: int
    num_kv_heads: int
    qk_head_dim: int
    v_head_dim: int
    dtype: torch.dtype
    scale: float
    latent: bool
    quantised: torch.dtype | None = None

    @property
    def kv_dtype(self) -> torch.dtype:
        return self.quantised or self.dtype


class PagedKernel(Protocol):
    """One kernel with its own plan."""

    def plan(self, table: KernelTable, page_indices: torch.Tensor, *, causal: bool, window: int | None = None) -> None:
        """page_indices: the table's, on the device. window: of causal rows, keys that a query sees before itself. May run while kernels of
        the plan before still wait for the device."""
        ...

    def run(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, out: PartialState | None, kv_scales: KVScales
    ) -> PartialState:
        """queries [q, heads, qk_head_dim] in the table's order; keys, values [pages, page_size, kv_heads, dim]. The result is the
        caller's; it lies in `out` where that is given."""
        ...


KernelFactory = Callable[[AttentionShape, int, torch.device], PagedKernel]
"""Builds a kernel for (shape, page size, device)."""


@dataclass
class _Part:
    kernel: PagedKernel
    page_size: int
    shape: AttentionShape
    planned_rows: Sequence[AttentionRow] | None = None


class PagedPartialAttention:
    """A `PartialAttention`. Plans when it meets a new step's rows, that is in the step's first layer. One kernel for rows over the pool,
    one for causal rows over the step's own tokens, and two more for the layers of a window."""

    def __init__(self, page_size: int, make_kernel: KernelFactory) -> None:
        self._page_size, self._make_kernel = page_size, make_kernel
        self._parts: dict[tuple[bool, int | None], _Part] = {}

    def prepare(self, shape: AttentionShape, window: int | None, device: torch.device) -> None:
        """Makes the kernels of the layers of a window, and plans and runs each over a token: that is when a library compiles and loads
        what it needs, which takes a minute and more. shape: of these layers over the pool; a chunk attends its own K/V unquantised."""
        first = np.zeros(1, dtype=np.int64)
        pool, chunk = tuple(pool_rows(1, 0, first, first, self._page_size, window)), (chunk_row(first, window),)
        queries = torch.zeros(1, shape.num_heads, shape.qk_head_dim, dtype=shape.dtype, device=device)
        for rows, dtype in ((pool, shape.kv_dtype), (chunk, shape.dtype)):
            keys = torch.zeros(self._page_size, shape.num_kv_heads, shape.qk_head_dim, device=device).to(dtype)
            self(queries, keys, keys[..., : shape.v_head_dim], rows, shape.scale)

    def __call__(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        rows: Sequence[AttentionRow],
        scale: float,
        out: PartialState | None = None,
        *,
        kv_scales: KVScales = NO_SCALES,
    ) -> PartialState:
        part = self._part(rows[0], _shape_of(queries, keys, values, scale), queries.device)
        if rows is not part.planned_rows:
            table = kernel_table(rows, part.page_size)
            if table.num_queries != len(queries):
                raise ValueError(f"attention rows of {table.num_queries} queries were given {len(queries)}")
            page_indices = to_device(torch.from_numpy(table.page_indices), queries.device)
            part.kernel.plan(table, page_indices, causal=rows[0].causal, window=rows[0].window if rows[0].causal else None)
            part.planned_rows = rows
        paged_keys, paged_values = (cache.unflatten(0, (-1, part.page_size)) for cache in (keys, values))
        return part.kernel.run(queries, paged_keys, paged_values, out, kv_scales)

    def _part(self, row: AttentionRow, shape: AttentionShape, device: torch.device) -> _Part:
        key = row.causal, row.window
        part = self._parts.get(key)
        if part is None:
            page_size = self._page_size if key == (False, None) else 1
            part = self._parts[key] = _Part(self._make_kernel(shape, page_size, device), page_size, shape)
        if shape != part.shape:
            raise ValueError(f"paged attention is planned once per step for all layers, but layers differ: {part.shape} and {shape}")
        return part


def _shape_of(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> AttentionShape:
    num_kv_heads, qk_head_dim = keys.shape[1:]
    return AttentionShape(
        num_heads=queries.shape[1],
        num_kv_heads=num_kv_heads,
        qk_head_dim=qk_head_dim,
        v_head_dim=values.shape[-1],
        dtype=queries.dtype,
        scale=scale,
        latent=num_kv_heads == 1 and values.shape[-1] != qk_head_dim,
        quantised=None if keys.dtype == queries.dtype else keys.dtype,
    )
