"""Partial attention of GQA decodes through FlashAttention 3, SGLang's default on a Hopper GPU (sgl_kernel).

Lengths and block tables are the static buffers of the step's tables, and the work is divided among multiprocessors on the device
(flash_schedule.py): a step needs nothing of the host. The library is imported when an adapter is built.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from sglang_dcp.dataflow.contracts import NO_SCALES, KVScales, PartialState

if TYPE_CHECKING:
    from sglang_dcp.dataflow.attention.flash_schedule import FlashSchedule

MOST_SPLITS = 128
"""What its merge of splits was run with here."""
FLASHES_OWN_SPLITS = 0
"""Its own number, which is of the block table's width: with it every row is cut alike, however long, and each cut costs."""
MOST_SCHEDULED = 992
"""Rows that the library schedules in one block; beyond, it splits none."""
MOST_GROUP = 64
"""Query heads per KV head that fit a tile of its queries, whatever the head dimension: a schedule has one tile per row."""


def most_splits(num_multiprocessors: int, kv_heads: int) -> int:
    """Parts that a row may be cut into, for a row alone to reach every multiprocessor. Where the number is named, the kernel cuts each row
    by its length, and does not cut short ones (measured: docs/results/kernels.md)."""
    return max(2, min(MOST_SPLITS, -(-num_multiprocessors // kv_heads)))


def splits_of(device: torch.device | str, kv_heads: int, *, own_split: bool) -> int:
    """The kernel's argument. own_split: as above, else FlashAttention's own."""
    if not own_split:
        return FLASHES_OWN_SPLITS
    return most_splits(torch.cuda.get_device_properties(device).multi_processor_count, kv_heads)


def has_causal_schedule(head_dim: int) -> bool:
    """Whether the kernel, called as causal, schedules one query token as such: for other heads it takes the call for one that is not."""
    return 64 < head_dim <= 128


def schedule_on(device: torch.device | str, num_rows: int, kv_heads: int, kv_dtype: torch.dtype, *, causal: bool = False) -> FlashSchedule:
    """A schedule for num_rows decode rows on `device`. causal: as `has_causal_schedule` says, where the call is."""
    from sglang_dcp.dataflow.attention.flash_schedule import FlashSchedule, block_tokens

    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    parts = most_splits(multiprocessors, kv_heads)
    return FlashSchedule(
        num_rows, kv_heads, parts, device, multiprocessors=multiprocessors, causal=causal, block_tokens=block_tokens(kv_dtype)
    )


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
        if self._schedule is None or heads > MOST_GROUP * self.num_kv_heads:
            return None
        return self._schedule.metadata

    def _descale(self, scale: float) -> torch.Tensor | None:
        """[S, kv_heads] of one number, made where a graph is captured."""
        if scale == 1.0:
            return None
        one = torch.full((1, 1), scale, dtype=torch.float32, device=self._kv_length.device)
        return one.expand(len(self._kv_length), self.num_kv_heads)
