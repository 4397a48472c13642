"""Partial attention of GQA decodes through FlashAttention 3, SGLang's default on a Hopper GPU (sgl_kernel).

Lengths and block tables are the static buffers of the step's tables, and the kernel divides the work among multiprocessors on the device:
a step needs nothing of the host. The library is imported when an adapter is built.
"""

from __future__ import annotations

from typing import Any

import torch

from sglang_dcp.dataflow.contracts import NO_SCALES, KVScales, PartialState

MOST_SPLITS = 128
"""What its merge of splits was run with here."""
FLASHES_OWN_SPLITS = 0
"""Its own number, which is of the block table's width: with it every row is cut alike, however long, and each cut costs."""


def most_splits(num_multiprocessors: int, kv_heads: int) -> int:
    """Parts that a row may be cut into, for a row alone to reach every multiprocessor. Where the number is named, the kernel cuts each row
    by its length, and does not cut short ones (measured: docs/results/kernels.md)."""
    return max(2, min(MOST_SPLITS, -(-num_multiprocessors // kv_heads)))


def splits_of(device: torch.device | str, kv_heads: int, *, own_split: bool) -> int:
    """The kernel's argument. own_split: as above, else FlashAttention's own."""
    if not own_split:
        return FLASHES_OWN_SPLITS
    return most_splits(torch.cuda.get_device_properties(device).multi_processor_count, kv_heads)


class FlashAttention3Decode:
    """One query token per attention row; queries and K/V of kv_dtype, bfloat16 or float8_e4m3fn, outputs bfloat16.

    block_table [S, width] and kv_length [S]: int32 device buffers of the step's tables. `run` may be captured.
    Its kernels are launched as some that may start before their predecessors end: whatever runs around them must not
    (`PeerExchange(early_launch=False)`).
    """

    def __init__(
        self, num_kv_heads: int, scale: float, block_table: torch.Tensor, kv_length: torch.Tensor, *, own_split: bool = True
    ) -> None:
        from sgl_kernel.flash_attn import flash_attn_with_kvcache

        self._attend: Any = flash_attn_with_kvcache
        self.num_kv_heads, self.scale = num_kv_heads, scale
        self._block_table, self._kv_length = block_table, kv_length
        self._num_splits = splits_of(block_table.device, num_kv_heads, own_split=own_split)

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
            return_softmax_lse=True,
        )
        return PartialState(output.squeeze(1), lse.squeeze(-1))

    def _descale(self, scale: float) -> torch.Tensor | None:
        """[S, kv_heads] of one number, made where a graph is captured."""
        if scale == 1.0:
            return None
        one = torch.full((1, 1), scale, dtype=torch.float32, device=self._kv_length.device)
        return one.expand(len(self._kv_length), self.num_kv_heads)
