"""Capacities fixed at start. Byte maps are derived from them in include/sgl_kernel_dcp/layout.cuh and nowhere else."""

from __future__ import annotations

from dataclasses import dataclass

MAX_INSTANCES = 16
MAX_HOME_ROWS = 1024
ELEMENT_BYTES = 2  # bfloat16


@dataclass(frozen=True)
class TableShape:
    """Sizes of the step's tables. All instances of a group use the same values."""

    num_instances: int
    max_home_rows: int  # M: rows of one instance's batch
    max_attention_rows: int  # S: rows one instance attends, own ones included
    max_kv_rows: int  # arriving K/V rows
    max_pages: int  # page indices of all attention rows together
    max_pages_per_row: int
    page_size: int

    def numbers(self) -> tuple[int, ...]:
        return (
            self.num_instances,
            self.max_home_rows,
            self.max_attention_rows,
            self.max_kv_rows,
            self.max_pages,
            self.max_pages_per_row,
            self.page_size,
        )


@dataclass(frozen=True)
class ExchangeShape:
    """Sizes of one layer's messages, bfloat16. kv_row_elements: K and V of one new token (MLA: latent and rotary part)."""

    num_heads: int
    qk_head_dim: int
    v_head_dim: int
    kv_row_elements: int
    max_return_rows: int  # partial results that may come from peers in one exchange

    def numbers(self, tables: TableShape) -> tuple[int, ...]:
        return (
            tables.num_instances,
            tables.max_home_rows,
            tables.max_attention_rows,
            tables.max_kv_rows,
            self.max_return_rows,
            self.num_heads,
            self.num_heads * self.qk_head_dim * ELEMENT_BYTES,
            self.v_head_dim * ELEMENT_BYTES,
            self.kv_row_elements * ELEMENT_BYTES,
        )
