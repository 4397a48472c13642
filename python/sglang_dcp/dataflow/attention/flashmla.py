"""Partial attention of MLA decodes through FlashMLA's dense Hopper kernels (the sgl-flash-mla wheel that SGLang installs).

Lengths and block tables are the static buffers of the step's tables, and the kernel's schedule is made from them on the device: a step
needs nothing of the host. The library is imported when an adapter is built.
"""

from __future__ import annotations

from typing import Any

import torch

from sglang_dcp.dataflow.attention.flashinfer_graph import MLA_LATENT_DIM, MLA_ROPE_DIM, QUANTISED, EmptyRows
from sglang_dcp.dataflow.contracts import PartialState

FLASH_MLA_PAGE_SIZE = 64
FLASH_MLA_HEADS = (16, 128)
"""Fewest and most query heads of an instance: the kernel works on tiles of 64 heads, so fewer would leave most of one empty; more was not
run."""


def check_flash_mla(num_heads: int, page_size: int) -> None:
    """ValueError naming what FlashMLA does not serve here."""
    fewest, most = FLASH_MLA_HEADS
    if not fewest <= num_heads <= most:
        raise ValueError(f"--attention-backend flashmla serves {fewest} to {most} heads per instance, this model has {num_heads}")
    if page_size != FLASH_MLA_PAGE_SIZE:
        raise ValueError(f"--attention-backend flashmla needs pages of {FLASH_MLA_PAGE_SIZE} tokens, got {page_size} (--page-size)")


class FlashMLADecode:
    """One query token per attention row, pages of 64 tokens; queries and latents of kv_dtype, bfloat16 or float8_e4m3fn, outputs bfloat16.

    block_table [S, width] and kv_length [S]: int32 device buffers of the step's tables.
    `plan` runs once per step ahead of the first layer, `run` in every layer; both may be captured.
    The kernel is launched as one that may start before its predecessor ends, and does not wait for it: whatever runs ahead of it must
    not let successors start (`PeerExchange(early_launch=False)`).
    num_parts > 1 treats each row as that many rows over equal parts of the block table (width must be a multiple) and merges them with
    sgl-kernel-dcp. For one or two very long rows: FlashMLA splits those among all multiprocessors, then combines the splits with
    few blocks per row.
    """

    def __init__(
        self,
        num_heads: int,
        scale: float,
        block_table: torch.Tensor,
        kv_length: torch.Tensor,
        *,
        num_parts: int = 1,
        kv_dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        import flash_mla

        check_flash_mla(num_heads, FLASH_MLA_PAGE_SIZE)
        self.num_heads, self.scale, self.num_parts = num_heads, scale, num_parts
        self._block_table, self._kv_length = block_table, kv_length
        self._library: Any = flash_mla
        self._quantised: dict[str, Any] = {}
        if kv_dtype == QUANTISED:
            # Elements are what they say: SGLang's latent pools are cast without a scale, and the queries like them.
            one = torch.ones(1, dtype=torch.float32, device=kv_length.device)
            self._quantised = {"is_fp8_kvcache": True, "descale_q": one, "descale_k": one}
        self._parts: _RowParts | None = None
        if num_parts > 1:
            self._parts = _RowParts(num_heads, block_table, kv_length, num_parts, kv_dtype)
            self._block_table, self._kv_length = self._parts.block_table, self._parts.kv_length
        self._empty_rows = EmptyRows(len(self._kv_length), kv_length.device) if self._quantised else None
        self._attended = torch.ones_like(self._kv_length) if self._quantised else self._kv_length
        self._schedule = self._make_schedule()

    def plan(self) -> None:
        """Schedules from `kv_length` on the device, into buffers that stay."""
        if self._parts is not None:
            self._parts.fill()
        if self._empty_rows is not None:
            # The kernel over quantised latents wants a key in every row, as SGLang's padding has; what comes of it has no weight.
            torch.clamp(self._kv_length, min=1, out=self._attended)
            self._empty_rows.update(self._kv_length)
        for kept, made in zip(self._schedule, self._make_schedule(), strict=True):
            kept.copy_(made)

    def _make_schedule(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What each multiprocessor does [parts, 8], and the first split of each row [S + 1]."""
        metadata, splits = self._library.get_mla_decoding_metadata(
            self._attended, self.num_heads, 1, is_fp8_kvcache=bool(self._quantised), use_legacy=True
        )
        return metadata, splits

    def run(self, queries: torch.Tensor, latent_cache: torch.Tensor, *, mark_neutral: bool = True) -> PartialState:
        """queries [S, heads, 576]; latent_cache [pages, 64, 576].

        mark_neutral=False leaves an empty shard's LSE as FlashMLA writes it, +inf: one kernel less, for a merge that takes +inf as
        neutral too, as that of sgl-kernel-dcp does.
        """
        check_flash_mla(self.num_heads, latent_cache.shape[1])
        from flash_mla.flash_mla_interface import FlashMLASchedMeta

        output, lse = self._library.flash_mla_with_kvcache(
            (queries if self._parts is None else self._parts.repeat(queries)).unsqueeze(1),
            latent_cache.unsqueeze(2),
            self._block_table,
            self._attended,
            MLA_LATENT_DIM,
            FlashMLASchedMeta(tile_scheduler_metadata=self._schedule[0], num_splits=self._schedule[1]),
            softmax_scale=self.scale,
            causal=False,
            use_legacy=True,
            **self._quantised,
        )
        output, lse = output.squeeze(1), lse.squeeze(-1)
        if self._empty_rows is not None:
            lse = lse + self._empty_rows.bias
        if self._parts is not None:
            return self._parts.merge(output, lse)
        if mark_neutral:
            lse = torch.nan_to_num(lse, nan=float("nan"), posinf=float("-inf"), neginf=float("-inf"))
        return PartialState(output, lse)


class _RowParts:
    """Rows cut into parts along their block tables; part-major, as the merge of stacked partials wants them."""

    def __init__(self, num_heads: int, block_table: torch.Tensor, kv_length: torch.Tensor, num_parts: int, dtype: torch.dtype) -> None:
        from sgl_kernel_dcp import merge_stacked

        rows, width = block_table.shape
        if width % num_parts != 0:
            raise ValueError(f"a block table of {width} pages per row cannot be cut into {num_parts} equal parts")
        device = block_table.device
        self._merge_stacked, self._num_parts = merge_stacked, num_parts
        self._whole_table, self._whole_length = block_table, kv_length
        self._begin = torch.arange(num_parts, dtype=torch.int32, device=device).unsqueeze(1) * (width // num_parts * FLASH_MLA_PAGE_SIZE)
        self.block_table = torch.zeros(num_parts * rows, width // num_parts, dtype=torch.int32, device=device)
        self.kv_length = torch.zeros(num_parts * rows, dtype=torch.int32, device=device)
        self._queries = torch.zeros(num_parts, rows, num_heads, MLA_LATENT_DIM + MLA_ROPE_DIM, dtype=dtype, device=device)
        self._output = torch.zeros(rows, num_heads, MLA_LATENT_DIM, dtype=torch.bfloat16, device=device)
        self._lse = torch.zeros(rows, num_heads, dtype=torch.float32, device=device)
        self.fill()

    def fill(self) -> None:
        """From the whole rows' buffers, once per step."""
        rows, part_width = len(self._whole_length), self.block_table.shape[1]
        self.block_table.view(self._num_parts, rows, part_width).copy_(
            self._whole_table.view(rows, self._num_parts, part_width).transpose(0, 1)
        )
        lengths = (self._whole_length.unsqueeze(0) - self._begin).clamp(0, part_width * FLASH_MLA_PAGE_SIZE)
        self.kv_length.copy_(lengths.flatten())

    def repeat(self, queries: torch.Tensor) -> torch.Tensor:
        self._queries.copy_(queries.unsqueeze(0).expand_as(self._queries))
        return self._queries.flatten(0, 1)

    def merge(self, outputs: torch.Tensor, lses: torch.Tensor) -> PartialState:
        shape = (self._num_parts, len(self._whole_length), *lses.shape[1:])
        self._merge_stacked(outputs.view(*shape, MLA_LATENT_DIM), lses.contiguous().view(shape), self._output, self._lse)
        return PartialState(self._output, self._lse)
