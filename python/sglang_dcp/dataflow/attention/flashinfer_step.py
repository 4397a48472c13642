"""FlashInfer kernels for a step's rows, planned with host arrays, so that planning does not wait for the device. bfloat16, over pools of
float8_e4m3fn too."""

from __future__ import annotations

from typing import Any

import torch

from sglang_dcp.dataflow.attention.flashinfer_graph import MLA_LATENT_DIM, MLA_ROPE_DIM, QUANTISED, WORKSPACE_BYTES, FlashInferPrefill
from sglang_dcp.dataflow.attention.kernel_table import KernelTable
from sglang_dcp.dataflow.attention.paged_attention import AttentionShape, PagedKernel
from sglang_dcp.dataflow.contracts import KVScales, PartialState
from sglang_dcp.dataflow.copy_guard import CopyGuard


class FlashInferGqaRows:
    """GQA: decode rows (one query) and chunks alike, tensor-core kernels."""

    def __init__(self, shape: AttentionShape, page_size: int, device: torch.device) -> None:
        heads = shape.num_heads, shape.num_kv_heads, shape.qk_head_dim
        self._kernel = FlashInferPrefill(*heads, page_size, shape.scale, device, kv_dtype=shape.kv_dtype)
        self._guard = CopyGuard(device)

    def plan(self, table: KernelTable, page_indices: torch.Tensor, *, causal: bool, window: int | None = None) -> None:
        with self._guard:
            self._kernel.plan(
                torch.from_numpy(table.query_indptr),
                torch.from_numpy(table.page_indptr),
                page_indices,
                torch.from_numpy(table.last_page_length),
                causal=causal,
                window=window,
            )

    def run(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, out: PartialState | None, kv_scales: KVScales
    ) -> PartialState:
        return self._kernel.run(queries, keys, values, out, kv_scales)


class FlashInferMlaRows:
    """MLA in absorbed form: queries [q, heads, 512 + 64] over a latent cache [pages, page_size, 1, 512 + 64]."""

    def __init__(self, shape: AttentionShape, page_size: int, device: torch.device) -> None:
        from flashinfer.mla import BatchMLAPagedAttentionWrapper

        self._shape, self._page_size = shape, page_size
        self._wrapper: Any = BatchMLAPagedAttentionWrapper(torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device), backend="fa3")
        self._guard = CopyGuard(device)
        # Latents are cast without a scale; the kernel wants to be told so.
        is_quantised = shape.quantised is not None
        self._plan_scales = {"scale_mode": "kv-per-tensor"} if is_quantised else {}
        self._run_scales = {"ckv_scale": 1.0, "kpe_scale": 1.0} if is_quantised else {}

    def plan(self, table: KernelTable, page_indices: torch.Tensor, *, causal: bool, window: int | None = None) -> None:
        from flashinfer.mla import MLAPlanMetadata

        assert window is None, "no model of latent attention that is served has a window"

        with self._guard:
            self._wrapper.plan(
                metadata=MLAPlanMetadata.csr(
                    qo_indptr=torch.from_numpy(table.query_indptr),
                    kv_indptr=torch.from_numpy(table.page_indptr),
                    kv_indices=page_indices,
                    kv_len_arr=torch.from_numpy(table.num_keys),
                ),
                num_heads=self._shape.num_heads,
                head_dim_ckv=MLA_LATENT_DIM,
                head_dim_kpe=MLA_ROPE_DIM,
                page_size=self._page_size,
                causal=causal,
                sm_scale=self._shape.scale,
                q_data_type=self._shape.dtype,
                kv_data_type=self._shape.kv_dtype,
                lse_mode="basee",
                **self._plan_scales,
            )

    def run(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, out: PartialState | None, kv_scales: KVScales
    ) -> PartialState:
        given: dict[str, Any] = {} if out is None else {"out": out.output, "lse": out.lse}
        given |= {"return_lse": True, "return_lse_base_on_e": True, **self._run_scales}
        output, lse = self._wrapper.run(query=queries, kv_cache=keys.squeeze(2), **given)
        return PartialState(output, lse)


def flashinfer_kernel(shape: AttentionShape, page_size: int, device: torch.device) -> PagedKernel:
    """The kernel for a model's layers. ValueError names what it does not serve."""
    if shape.dtype != torch.bfloat16:
        raise ValueError(f"sharded attention on a GPU serves bfloat16, this model has {shape.dtype} (--dtype bfloat16)")
    if shape.quantised not in (None, QUANTISED):
        raise ValueError(f"sharded attention on a GPU serves no pool of {shape.quantised} (--kv-cache-dtype)")
    if not shape.latent:
        return FlashInferGqaRows(shape, page_size, device)
    dims = (shape.v_head_dim, shape.qk_head_dim - shape.v_head_dim)
    if dims != (MLA_LATENT_DIM, MLA_ROPE_DIM):
        raise ValueError(f"sharded MLA on a GPU serves latents of {MLA_LATENT_DIM} + {MLA_ROPE_DIM}, this model has {dims[0]} + {dims[1]}")
    return FlashInferMlaRows(shape, page_size, device)
