"""Partial attention on CUDA through FlashInfer and FlashMLA. Each adapter returns PartialState: natural-log LSE, -inf for an empty shard.

Split as the libraries are: `plan` does the host's work once per step, `run` launches and may be captured. Page lists, lengths and
block tables are the static buffers of the step's tables; `plan` is given the same numbers on the host, so that nothing synchronises.
Libraries are imported when an adapter is built.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from sglang_dcp.dataflow.contracts import PartialState

LN_2 = math.log(2.0)
WORKSPACE_BYTES = 256 << 20
FLASH_MLA_PAGE_SIZE = 64
MLA_LATENT_DIM = 512
MLA_ROPE_DIM = 64


@dataclass(frozen=True)
class KernelBuffers:
    """What kernels that never run at the same time share: FlashInfer's workspace, and the result of up to `rows` rows."""

    workspace: torch.Tensor
    output: torch.Tensor
    lse: torch.Tensor
    natural_lse: torch.Tensor

    @staticmethod
    def allocate(rows: int, num_heads: int, v_head_dim: int, device: torch.device | str) -> KernelBuffers:
        lse = torch.zeros(rows, num_heads, dtype=torch.float32, device=device)
        return KernelBuffers(
            torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device),
            torch.zeros(rows, num_heads, v_head_dim, dtype=torch.bfloat16, device=device),
            lse,
            torch.zeros_like(lse),
        )

    def first(self, rows: int) -> KernelBuffers:
        return KernelBuffers(self.workspace, self.output[:rows], self.lse[:rows], self.natural_lse[:rows])


def _row_bias(lengths: torch.Tensor, bias: torch.Tensor) -> None:
    """bias[row] = 0 where the shard holds tokens, -inf where it is empty (FlashInfer writes a large finite number there)."""
    bias.copy_(torch.where(lengths > 0, 0.0, float("-inf")).unsqueeze(-1), non_blocking=True)


class FlashInferDecode:
    """GQA decode: one query token per attention row, bfloat16, tensor-core kernels.

    page_indptr [S + 1], page_indices, last_page_length [S]: int32 device buffers, filled before `run`. S is fixed; rows beyond the
    step's have no pages.
    """

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        scale: float,
        page_indptr: torch.Tensor,
        page_indices: torch.Tensor,
        last_page_length: torch.Tensor,
        buffers: KernelBuffers | None = None,
    ) -> None:
        import flashinfer

        device, rows = page_indptr.device, len(last_page_length)
        buffers = buffers or KernelBuffers.allocate(rows, num_heads, head_dim, device)
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.page_size, self.scale, self._page_indices = page_size, scale, page_indices
        self._wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            buffers.workspace,
            "NHD",
            use_cuda_graph=True,
            use_tensor_cores=True,
            paged_kv_indptr_buffer=page_indptr,
            paged_kv_indices_buffer=page_indices,
            paged_kv_last_page_len_buffer=last_page_length,
        )
        self._output, self._lse, self._natural_lse = buffers.output, buffers.lse, buffers.natural_lse
        self._bias = torch.zeros(rows, 1, dtype=torch.float32, device=device)

    def plan(self, page_indptr: torch.Tensor, last_page_length: torch.Tensor) -> None:
        """Host copies of the two buffers (int32)."""
        self._wrapper.plan(
            page_indptr,
            self._page_indices[: int(page_indptr[-1])],
            last_page_length,
            self.num_heads,
            self.num_kv_heads,
            self.head_dim,
            self.page_size,
            sm_scale=self.scale,
            q_data_type=torch.bfloat16,
            kv_data_type=torch.bfloat16,
        )
        _row_bias(page_indptr.diff(), self._bias)

    def run(self, queries: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor) -> PartialState:
        """queries [S, heads, head_dim]; caches [pages, page_size, kv_heads, head_dim]. The result lives until the next run."""
        self._wrapper.run(queries, (key_cache, value_cache), out=self._output, lse=self._lse, return_lse=True)
        torch.add(self._bias, self._lse, alpha=LN_2, out=self._natural_lse)
        return PartialState(self._output, self._natural_lse)


class FlashInferPrefill:
    """GQA attention of query chunks over one shard's pages: all keys visible, or causal at the end of the pages (the tail)."""

    def __init__(self, num_heads: int, num_kv_heads: int, head_dim: int, page_size: int, scale: float, device: torch.device | str) -> None:
        import flashinfer

        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.page_size, self.scale = page_size, scale
        workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD", backend="fa2")
        self._empty_tokens: torch.Tensor | None = None

    def plan(
        self,
        query_indptr: torch.Tensor,
        page_indptr: torch.Tensor,
        page_indices: torch.Tensor,
        last_page_length: torch.Tensor,
        *,
        causal: bool,
    ) -> None:
        """int32; indptrs and last_page_length on the host, page_indices on the device. causal: a row's queries are its last keys."""
        self._wrapper.plan(
            query_indptr,
            page_indptr,
            page_indices,
            last_page_length,
            self.num_heads,
            self.num_kv_heads,
            self.head_dim,
            self.page_size,
            causal=causal,
            sm_scale=self.scale,
            q_data_type=torch.bfloat16,
            kv_data_type=torch.bfloat16,
        )
        empty = (page_indptr.diff() == 0).repeat_interleave(query_indptr.diff())
        self._empty_tokens = empty.to(page_indices.device, non_blocking=True).unsqueeze(-1) if bool(empty.any()) else None

    def run(
        self, queries: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor, out: PartialState | None = None
    ) -> PartialState:
        """queries [tokens, heads, head_dim]; caches [pages, page_size, kv_heads, head_dim]. The result lies in `out`, where given."""
        given = None if out is None else out.output
        output, lse = self._wrapper.run(queries, (key_cache, value_cache), out=given, return_lse=True)
        lse = torch.mul(lse, LN_2, out=None if out is None else out.lse)
        if self._empty_tokens is not None:
            lse.masked_fill_(self._empty_tokens, float("-inf"))
        return PartialState(output, lse)


class FlashInferMLA:
    """MLA decode in absorbed form: queries [S, heads, 512 + 64] over the latent cache [pages, page_size, 512 + 64]."""

    def __init__(
        self,
        num_heads: int,
        page_size: int,
        scale: float,
        page_indptr: torch.Tensor,
        page_indices: torch.Tensor,
        kv_length: torch.Tensor,
        buffers: KernelBuffers | None = None,
    ) -> None:
        from flashinfer.mla import BatchMLAPagedAttentionWrapper

        device, rows = page_indptr.device, len(kv_length)
        buffers = buffers or KernelBuffers.allocate(rows, num_heads, MLA_LATENT_DIM, device)
        self.num_heads, self.page_size, self.scale, self._page_indices = num_heads, page_size, scale, page_indices
        self._query_indptr = torch.arange(rows + 1, dtype=torch.int32)
        self._wrapper = BatchMLAPagedAttentionWrapper(
            buffers.workspace,
            use_cuda_graph=True,
            qo_indptr=self._query_indptr.to(device),
            kv_indptr=page_indptr,
            kv_indices=page_indices,
            kv_len_arr=kv_length,
            backend="fa3",
        )
        self._output, self._lse, self._natural_lse = buffers.output, buffers.lse, buffers.natural_lse
        self._bias = torch.zeros(rows, 1, dtype=torch.float32, device=device)

    def plan(self, page_indptr: torch.Tensor, kv_length: torch.Tensor) -> None:
        """Host copies of the two buffers (int32)."""
        from flashinfer.mla import MLAPlanMetadata

        pages = self._page_indices[: int(page_indptr[-1])]
        self._wrapper.plan(
            metadata=MLAPlanMetadata.csr(qo_indptr=self._query_indptr, kv_indptr=page_indptr, kv_indices=pages, kv_len_arr=kv_length),
            num_heads=self.num_heads,
            head_dim_ckv=MLA_LATENT_DIM,
            head_dim_kpe=MLA_ROPE_DIM,
            page_size=self.page_size,
            causal=False,
            sm_scale=self.scale,
            q_data_type=torch.bfloat16,
            kv_data_type=torch.bfloat16,
            lse_mode="basee",
        )
        _row_bias(kv_length, self._bias)

    def run(self, queries: torch.Tensor, latent_cache: torch.Tensor) -> PartialState:
        """The result lives until the next run."""
        self._wrapper.run(query=queries, kv_cache=latent_cache, out=self._output, lse=self._lse, return_lse=True, return_lse_base_on_e=True)
        torch.add(self._bias, self._lse, out=self._natural_lse)
        return PartialState(self._output, self._natural_lse)


class FlashMLADecode:
    """MLA decode through FlashMLA's dense Hopper kernel (the sgl-flash-mla wheel that SGLang installs). Pages of 64 tokens.

    block_table [S, width] and kv_length [S]: int32 device buffers of the step's tables.
    num_parts > 1 treats each row as that many rows over equal parts of the block table (width must be a multiple) and merges them with
    sgl-kernel-dcp. For one or two very long rows: FlashMLA splits those among all multiprocessors, then combines the splits with
    few blocks per row.
    """

    def __init__(self, num_heads: int, scale: float, block_table: torch.Tensor, kv_length: torch.Tensor, *, num_parts: int = 1) -> None:
        import flash_mla

        self.num_heads, self.scale, self.num_parts = num_heads, scale, num_parts
        self._block_table, self._kv_length = block_table, kv_length
        self._library: Any = flash_mla
        self._schedule: tuple[torch.Tensor, torch.Tensor] | None = None
        self._parts: _RowParts | None = None
        if num_parts > 1:
            self._parts = _RowParts(num_heads, block_table, kv_length, num_parts)
            self._block_table, self._kv_length = self._parts.block_table, self._parts.kv_length

    def plan(self) -> None:
        """Schedules from `kv_length` on the device; no host work. The buffers stay the same from the second call on."""
        if self._parts is not None:
            self._parts.fill()
        metadata, splits = self._library.get_mla_decoding_metadata(self._kv_length, self.num_heads, 1, use_legacy=True)
        if self._schedule is None:
            self._schedule = (metadata, splits)
            return
        self._schedule[0].copy_(metadata)
        self._schedule[1].copy_(splits)

    def run(self, queries: torch.Tensor, latent_cache: torch.Tensor, *, mark_neutral: bool = True) -> PartialState:
        """queries [S, heads, 576]; latent_cache [pages, 64, 576].

        mark_neutral=False leaves an empty shard's LSE as FlashMLA writes it, +inf: one kernel less, for a merge that takes +inf as
        neutral too, as that of sgl-kernel-dcp does.
        """
        if self._schedule is None:
            raise RuntimeError("FlashMLADecode.plan must run before run")
        if latent_cache.shape[1] != FLASH_MLA_PAGE_SIZE:
            raise ValueError(f"FlashMLA needs pages of {FLASH_MLA_PAGE_SIZE} tokens, got {latent_cache.shape[1]} (--page-size)")
        from flash_mla.flash_mla_interface import FlashMLASchedMeta

        output, lse = self._library.flash_mla_with_kvcache(
            (queries if self._parts is None else self._parts.repeat(queries)).unsqueeze(1),
            latent_cache.unsqueeze(2),
            self._block_table,
            self._kv_length,
            MLA_LATENT_DIM,
            FlashMLASchedMeta(tile_scheduler_metadata=self._schedule[0], num_splits=self._schedule[1]),
            softmax_scale=self.scale,
            causal=False,
            use_legacy=True,
        )
        output, lse = output.squeeze(1), lse.squeeze(-1)
        if self._parts is not None:
            return self._parts.merge(output, lse)
        if mark_neutral:
            lse = torch.nan_to_num(lse, nan=float("nan"), posinf=float("-inf"), neginf=float("-inf"))
        return PartialState(output, lse)


class _RowParts:
    """Rows cut into parts along their block tables; part-major, as the merge of stacked partials wants them."""

    def __init__(self, num_heads: int, block_table: torch.Tensor, kv_length: torch.Tensor, num_parts: int) -> None:
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
        self._queries = torch.zeros(num_parts, rows, num_heads, MLA_LATENT_DIM + MLA_ROPE_DIM, dtype=torch.bfloat16, device=device)
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
