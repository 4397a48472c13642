"""MLA's form in steps with sharded rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang_dcp.upstream.layers.attention_backend import step_is_sharded


def register_mla_form() -> None:
    """MLA's form on a GPU: absorbed in a step with sharded rows, in prefill too, because shards hold latents. Else stock's choice."""
    from sglang.srt.models.deepseek_common.attention_backend_handler import AttentionBackendRegistry

    for name in ("flashinfer", "flashmla"):
        AttentionBackendRegistry.register(name, _absorbed_when_sharded(AttentionBackendRegistry.get_handler(name)))


def _absorbed_when_sharded(stock: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    from sglang.srt.models.deepseek_common.attention_forward_methods.forward_methods import AttnForwardMethod

    def choose(attention: Any, forward_batch: Any) -> Any:
        return AttnForwardMethod.MLA if step_is_sharded() else stock(attention, forward_batch)

    return choose
