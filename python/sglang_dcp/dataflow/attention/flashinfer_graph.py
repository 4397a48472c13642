"""Partial attention on CUDA through FlashInfer. Each adapter returns PartialState: natural-log LSE, -inf for an empty shard.

Split as the library is: `plan` does the host's work once per step, `run` launches and may be captured. Page lists and lengths are the
static buffers of the step's tables; `plan` is given the same numbers on the host, so that nothing synchronises. The library is imported
when an adapter is built.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from sglang_dcp.dataflow.attention.split_budget import with_split_budget
from sglang_dcp.dataflow.contracts import NO_SCALES, KVScales, PartialState
from sglang_dcp.dataflow.graph.chunk_schedule import ChunkSchedule

LN_2 = math.log(2.0)
WORKSPACE_BYTES = 256 << 20
MLA_LATENT_DIM = 512
MLA_ROPE_DIM = 64
QUANTISED = torch.float8_e4m3fn
"""The element type of quantised pools: its kernels take them beside bfloat16 queries."""


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


class EmptyRows:
    """What is added to the LSE of rows: 0 where the shard holds tokens, -inf where it is empty (FlashInfer writes a large finite number
    there)."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self.bias = torch.zeros(rows, 1, dtype=torch.float32, device=device)
        self._values = torch.tensor([[float("-inf")], [0.0]], device=device)
        self._holds = torch.zeros(rows, dtype=torch.int64, device=device)

    def update(self, lengths: torch.Tensor) -> None:
        """lengths [rows] on the device. May be captured."""
        torch.gt(lengths, 0, out=self._holds)
        torch.index_select(self._values, 0, self._holds, out=self.bias)


class FlashInferDecode:
    """GQA decode: one query token per attention row, bfloat16, tensor-core kernels.

    page_indptr [S + 1], page_indices, last_page_length [S]: int32 device buffers, filled before `run`. S is fixed; rows beyond the
    step's have no pages. own_split: long rows are split by split_budget.py, else by FlashInfer's own budget.
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
        *,
        own_split: bool = True,
        kv_dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        import flashinfer

        device, rows = page_indptr.device, len(last_page_length)
        buffers = buffers or KernelBuffers.allocate(rows, num_heads, head_dim, device)
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.page_size, self.scale, self.kv_dtype, self._page_indices = page_size, scale, kv_dtype, page_indices
        self._wrapper = with_split_budget(flashinfer.BatchDecodeWithPagedKVCacheWrapper, own=own_split)(
            buffers.workspace,
            "NHD",
            use_cuda_graph=True,
            use_tensor_cores=True,
            paged_kv_indptr_buffer=page_indptr,
            paged_kv_indices_buffer=page_indices,
            paged_kv_last_page_len_buffer=last_page_length,
        )
        self._output, self._lse, self._natural_lse = buffers.output, buffers.lse, buffers.natural_lse
        self._empty_rows = EmptyRows(rows, device)
        self._schedule = ChunkSchedule(page_size)

    def mark_empty_rows(self, lengths: torch.Tensor) -> None:
        """lengths [S] on the device: tokens (or pages) of each row here. Once per step ahead of `run`; may be captured."""
        self._empty_rows.update(lengths)

    def serves(self, page_counts: np.ndarray) -> bool:
        """Whether the last plan serves rows of these page counts."""
        return self._schedule.serves(page_counts)

    def serves_longer(self, begun: Sequence[int]) -> bool:
        """The same where rows that it serves began a page since, and have these many now."""
        return self._schedule.serves_longer(begun)

    def plan(self, page_indptr: torch.Tensor, last_page_length: torch.Tensor) -> None:
        """Host copies of the two buffers (int32). The first plan also fills these, later ones leave them to the step's tables."""
        counts = np.diff(page_indptr.numpy())
        lengths = torch.from_numpy(np.maximum(counts - 1, 0) * self.page_size + last_page_length.numpy())
        if not self._wrapper.plan_again(page_indptr, lengths):
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
                kv_data_type=self.kv_dtype,
            )
        self._schedule.read(self._wrapper, counts)

    def run(
        self, queries: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor, kv_scales: KVScales = NO_SCALES
    ) -> PartialState:
        """queries [S, heads, head_dim]; caches [pages, page_size, kv_heads, head_dim]. The result lives until the next run."""
        scales = {"k_scale": kv_scales.key, "v_scale": kv_scales.value}
        self._wrapper.run(queries, (key_cache, value_cache), out=self._output, lse=self._lse, return_lse=True, **scales)
        torch.add(self._empty_rows.bias, self._lse, alpha=LN_2, out=self._natural_lse)
        return PartialState(self._output, self._natural_lse)


class FlashInferPrefill:
    """GQA attention of query chunks over one shard's pages: all keys visible, or causal at the end of the pages (the tail)."""

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        scale: float,
        device: torch.device | str,
        *,
        kv_dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        import flashinfer

        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.page_size, self.scale, self.kv_dtype = page_size, scale, kv_dtype
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
        window: int | None = None,
    ) -> None:
        """int32; indptrs and last_page_length on the host, page_indices on the device. causal: a row's queries are its last keys, of which
        each sees itself and `window` before it, None: all."""
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
            window_left=-1 if window is None else window,
            sm_scale=self.scale,
            q_data_type=torch.bfloat16,
            kv_data_type=self.kv_dtype,
        )
        empty = (page_indptr.diff() == 0).repeat_interleave(query_indptr.diff())
        self._empty_tokens = empty.to(page_indices.device, non_blocking=True).unsqueeze(-1) if bool(empty.any()) else None

    def run(
        self,
        queries: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        out: PartialState | None = None,
        kv_scales: KVScales = NO_SCALES,
    ) -> PartialState:
        """queries [tokens, heads, head_dim]; caches [pages, page_size, kv_heads, head_dim]. The result lies in `out`, where given."""
        given = None if out is None else out.output
        scales = {"k_scale": kv_scales.key, "v_scale": kv_scales.value}
        output, lse = self._wrapper.run(queries, (key_cache, value_cache), out=given, return_lse=True, **scales)
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
        self._empty_rows = EmptyRows(rows, device)

    def mark_empty_rows(self, lengths: torch.Tensor) -> None:
        """As FlashInferDecode.mark_empty_rows."""
        self._empty_rows.update(lengths)

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

    def run(self, queries: torch.Tensor, latent_cache: torch.Tensor) -> PartialState:
        """The result lives until the next run."""
        self._wrapper.run(query=queries, kv_cache=latent_cache, out=self._output, lse=self._lse, return_lse=True, return_lse_base_on_e=True)
        torch.add(self._empty_rows.bias, self._lse, out=self._natural_lse)
        return PartialState(self._output, self._natural_lse)
