"""What the graphs of a server are built for: capacities of their buffers, and which kernel serves which attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from sgl_kernel_dcp import ExchangeShape, TableShape

from sglang_dcp.dataflow.attention.flashmla import check_flash_mla
from sglang_dcp.dataflow.attention.paged_attention import AttentionShape

GraphKernel = Literal["flashinfer", "flashmla", "fa3"]


@dataclass(frozen=True)
class GraphSizes:
    """Capacities of an instance's graphs. num_instances: of its exchange group; guest_rows: the captured numbers, ascending;
    context_pages: most pages of one request; pool_pages: of this instance's pool, with the padding page."""

    num_instances: int
    max_home_rows: int
    guest_rows: tuple[int, ...]
    page_size: int
    context_pages: int
    pool_pages: int

    @property
    def max_rows(self) -> int:
        return self.max_home_rows + self.guest_rows[-1]

    def tables(self) -> TableShape:
        return TableShape(
            num_instances=self.num_instances,
            max_home_rows=self.max_home_rows,
            max_attention_rows=self.max_rows,
            max_kv_rows=self.guest_rows[-1],
            max_pages=self.max_rows * self.context_pages,
            max_pages_per_row=self.context_pages,
            page_size=self.page_size,
        )

    def exchange(self, shape: AttentionShape, kernel: GraphKernel = "flashinfer") -> ExchangeShape:
        # In elements of the queries' type, whatever lies in the row.
        kv_row = shape.qk_head_dim if shape.latent else shape.num_kv_heads * (shape.qk_head_dim + shape.v_head_dim)
        kv_row = kv_row * shape.kv_dtype.itemsize // shape.dtype.itemsize
        query = shape.qk_head_dim * query_dtype(shape, kernel).itemsize // shape.dtype.itemsize
        most_returns = min(self.max_home_rows, self.guest_rows[-1]) * (self.num_instances - 1)
        return ExchangeShape(shape.num_heads, query, shape.v_head_dim, kv_row, most_returns)


def query_dtype(shape: AttentionShape, kernel: GraphKernel) -> torch.dtype:
    """What queries travel as: over a quantised pool in its type, where the kernel takes both alike, as it does in SGLang."""
    return shape.dtype if kernel == "flashinfer" else shape.kv_dtype


def check_kernel(kernel: GraphKernel, shape: AttentionShape, page_size: int, windows: Sequence[int] = ()) -> None:
    """ValueError naming what the kernel does not serve."""
    if windows and kernel != "fa3":
        raise ValueError(f"--attention-backend {kernel} serves no window layers in decode graphs with sharded rows; use fa3")
    if kernel == "flashmla":
        check_flash_mla(shape.num_heads, page_size)
    elif kernel == "fa3" and shape.latent:
        raise ValueError("--attention-backend fa3 serves no latent attention (MLA) in decode graphs with sharded rows")
    elif shape.latent and shape.quantised is not None:
        raise ValueError(f"decode graphs over latent pools of {shape.quantised} need --attention-backend flashmla")
