"""Our backends in SGLang's registry: a stock backend of the same name, with StepBackend before it."""

from __future__ import annotations

from typing import Any

import torch

from sglang_dcp.dataflow.attention.split_budget import with_split_budget
from sglang_dcp.dataflow.copy_guard import CopyGuard
from sglang_dcp.upstream.attach.cuda_settings import (
    QUANTISED_KV,
    find_kv_type_refusal,
    find_sliced_kv_refusal,
    is_quantised,
)
from sglang_dcp.upstream.layers.attention_backend import make_backend_class
from sglang_dcp.upstream.layers.graphs import splits_long_rows


def register_backends() -> None:
    """Registers our backends in place of stock's, under the same names: SGLang tells backends apart by name in many places."""
    from sglang.srt.layers.attention.attention_registry import register_attention_backend

    register_attention_backend("torch_native")(create_torch_native)
    register_attention_backend("flashinfer")(create_flashinfer)
    register_attention_backend("fa3")(create_fa3)
    register_attention_backend("flashmla")(create_flashmla)


def create_torch_native(runner: Any) -> Any:
    check_kv_type(runner, "torch_native")
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

    class TorchNativeBackend(TorchNativeAttnBackend):
        def get_cuda_graph_seq_len_fill_value(self) -> int:
            """ForwardBatch pads with it, also where no graph is captured; stock's torch_native has none. A row needs a key at least."""
            return 1

    return make_backend_class(TorchNativeBackend)(runner)


def create_flashinfer(runner: Any) -> Any:
    """As stock's factory does without speculative decoding (which is refused)."""
    check_kv_type(runner, "flashinfer")
    if runner.use_mla_backend:
        from sglang.srt.layers.attention.flashinfer_mla_backend import FlashInferMLAAttnBackend

        return _for_runner(make_backend_class(FlashInferMLAAttnBackend)(runner), runner)
    import sglang.srt.layers.attention.flashinfer_backend as flashinfer_backend

    if splits_long_rows():
        # Its decode graphs too: a long row that lies whole in a pool meets the same limit in a step in which nobody is sharded.
        flashinfer_backend.BatchDecodeWithPagedKVCacheWrapper = with_split_budget(flashinfer_backend.BatchDecodeWithPagedKVCacheWrapper)
    from sglang.srt.environ import envs
    from sglang.srt.layers.attention.flashinfer_backend import FlashInferAttnBackend

    backend = make_backend_class(FlashInferAttnBackend)(runner, init_new_workspace=runner.init_new_workspace)
    backend.dyncp_chunks_read_the_pool = bool(envs.SGLANG_FLASHINFER_USE_PAGED.get())
    return _for_runner(backend, runner)


def create_fa3(runner: Any) -> Any:
    """SGLang's default on a Hopper GPU. Graphs with sharded rows run its kernel too; eager steps with some never enter it, and run
    FlashInfer's over the same pool."""
    check_kv_type(runner, "fa3")
    if runner.use_mla_backend:
        raise ValueError("--attention-backend fa3 with --enable-dyncp serves no latent attention (MLA); use flashinfer or flashmla")
    from sglang.srt.layers.attention.flashattention_backend import FlashAttentionBackend

    backend = make_backend_class(FlashAttentionBackend, kernel="fa3")(runner)
    backend.dyncp_runner = runner  # no guard: it plans nothing in pinned memory
    if splits_long_rows():
        # Decodes in which nobody is sharded meet long rows too: those that lie whole in a pool. SGLang's own split cuts every row alike.
        from sglang_dcp.upstream.layers.flash_schedules import schedule_ahead

        schedule_ahead(backend, runner.device)
    backend.dyncp_chunks_read_the_pool = backend.dyncp_rounds_queries = True
    return backend


def create_flashmla(runner: Any) -> Any:
    """FlashMLA decodes; prefills are FlashInfer's, which it inherits."""
    check_kv_type(runner, "flashmla")
    if not runner.use_mla_backend:
        raise ValueError("--attention-backend flashmla serves models with latent attention (MLA) alone; use flashinfer")
    check_latent_scales(runner)
    from sglang.srt.layers.attention.flashmla_backend import FlashMLABackend
    from sglang.srt.runtime_context import get_exec

    backend = make_backend_class(FlashMLABackend, kernel="flashmla")(runner)
    # Else stock's chunks read theirs back behind a prefix alone, which ours do not: what they attend is the more exact.
    backend.dyncp_chunks_read_the_pool = bool(get_exec().kernel.flashinfer_mla_disable_ragged)
    return _for_runner(backend, runner)


def check_kv_type(runner: Any, backend: str) -> None:
    """Raises ValueError where the pool is quantised as we do not serve it, which the checkpoint may have asked for: ahead of the first
    capture."""
    message = find_kv_type_refusal(runner.kv_cache_dtype, backend, latent=runner.use_mla_backend)
    if message is None and is_quantised(runner.kv_cache_dtype):
        from sglang.srt.runtime_context import get_parallel

        message = find_sliced_kv_refusal(runner.kv_cache_dtype, get_parallel().attn_tp_size)
    if message is not None:
        raise ValueError(message)


def check_latent_scales(runner: Any) -> None:
    """Raises ValueError for a latent layer (MLA) whose quantised K/V a checkpoint scales: SGLang's pool casts it unscaled, its FlashMLA
    backend reads it as scaled, so there is nothing that sharded steps could agree with."""
    if not is_quantised(runner.kv_cache_dtype):
        return
    for module in runner.model.modules():
        scale = getattr(module, "k_scale_float", None)
        if scale not in (None, 1.0):
            raise ValueError(
                f"--kv-cache-dtype {QUANTISED_KV} does not work with --enable-dyncp for this checkpoint: attention layer {module.layer_id} "
                f"has k_scale {scale}, and latent attention (MLA) is served with 1; give --kv-cache-dtype bfloat16"
            )


def _for_runner(backend: Any, runner: Any) -> Any:
    """With a guard: FlashInfer plans a step in pinned memory and SGLang does not wait until the plan before has been copied from there.
    Where other processes share the GPU it is late: answers of stock SGLang then change from run to run (docs/gpu.md)."""
    backend.dyncp_runner, backend.dyncp_guard = runner, CopyGuard(torch.device(runner.device))
    return backend
