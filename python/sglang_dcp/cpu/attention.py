"""What SGLang's torch_native attention backend lacks on the CPU. Stock serving uses it; dynamic context parallelism brings its own."""

from __future__ import annotations

from typing import Any


def cpu_graph_seq_len_fill_value(_backend: Any) -> int:
    """Added as TorchNativeAttnBackend.get_cpu_graph_seq_len_fill_value, which ForwardBatch calls on a CPU to pad a batch.

    A padding row must have at least one key: softmax over nothing is NaN.
    """
    return 1


def register_absorbed_mla() -> None:
    """Makes DeepSeek's attention use the absorbed form on torch_native, in prefill too.

    Unknown backends get the triton handler, which picks the multi-head form for a prefill without prefix; torch_native then
    writes 48-wide keys into the 80-wide latent pool and fails.
    """
    from sglang.srt.models.deepseek_common.attention_backend_handler import AttentionBackendRegistry
    from sglang.srt.models.deepseek_common.attention_forward_methods.forward_methods import AttnForwardMethod

    AttentionBackendRegistry.register("torch_native", lambda _attention, _forward_batch: AttnForwardMethod.MLA)
