"""Partial attention of GQA decodes through FlashAttention 3, SGLang's default on a Hopper GPU (sgl_kernel).

Lengths and block tables are the static buffers of the step's tables, and the work is divided among multiprocessors on the device
(flash_schedule.py): a step needs nothing of the host. The library is imported when an adapter is built.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from sglang_dcp.dataflow.attention.flash_splits import MOST_SCHEDULED, has_one_tile, splits_of
from sglang_dcp.dataflow.contracts import NO_SCALES, KVScales, PartialState

if TYPE_CHECKING:
    from sglang_dcp.dataflow.attention.flash_schedule import FlashSchedule


class FlashAttention3Decode:
    """One query token per attention row; queries and K/V of kv_dtype, bfloat16 or float8_e4m3fn, outputs bfloat16.

    block_table [S, width] and kv_length [S]: int32 device buffers of the step's tables. own_split: scheduled by us, up to MOST_SCHEDULED
    rows, else by the library in every layer. `plan` runs once per step ahead of its layers, `run` in each of them; both may be captured.
    Its kernels are launched as some that may start before their predecessors end: whatever runs around them must not
    (`PeerExchange(early_launch=False)`).
    """

    def __init__(
        self,
        num_kv_heads: int,
        scale: float,
        block_table: torch.Tensor,
        kv_length: torch.Tensor,
        *,
        own_split: bool = True,
        kv_dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        from sgl_kernel.flash_attn import flash_attn_with_kvcache

        self._attend: Any = flash_attn_with_kvcache
        self.num_kv_heads, self.scale = num_kv_heads, scale
        self._block_table, self._kv_length = block_table, kv_length
        self._num_splits = splits_of(block_table.device, num_kv_heads, own_split=own_split)
        self._schedule: FlashSchedule | None = None
        if own_split and len(kv_length) <= MOST_SCHEDULED:
            from sglang_dcp.dataflow.attention.flash_schedule import schedule_on

            self._schedule = schedule_on(kv_length.device, len(kv_length), num_kv_heads, kv_dtype)

    def plan(self) -> None:
        """Schedules the rows from `kv_length`, on the device."""
        if self._schedule is not None:
            self._schedule.plan(self._kv_length)

    def run(
        self, queries: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor, kv_scales: KVScales = NO_SCALES
    ) -> PartialState:
        """queries [S, heads, head_dim]; caches [pages, page_size, kv_heads, head_dim]."""
        output, lse, *_ = self._attend(
            queries.unsqueeze(1),
            key_cache,
            value_cache,
            cache_seqlens=self._kv_length,
            page_table=self._block_table,
            k_descale=self._descale(kv_scales.key),
            v_descale=self._descale(kv_scales.value),
            softmax_scale=self.scale,
            num_splits=self._num_splits,
            scheduler_metadata=self._schedule_for(queries.shape[1]),
            return_softmax_lse=True,
        )
        return PartialState(output.squeeze(1), lse.squeeze(-1))

    def _schedule_for(self, heads: int) -> torch.Tensor | None:
        if self._schedule is None or not has_one_tile(heads, self.num_kv_heads):
            return None
        return self._schedule.metadata

    def _descale(self, scale: float) -> torch.Tensor | None:
        """[S, kv_heads] of one number, made where a graph is captured."""
        if scale == 1.0:
            return None
        one = torch.full((1, 1), scale, dtype=torch.float32, device=self._kv_length.device)
        return one.expand(len(self._kv_length), self.num_kv_heads)
