"""SGLang plugin for tests: what SGLANG_FORCE_FUSED_OP_BACKEND=torch leaves of 16-bit kernels, in plain torch. Stock and ours get the same.

With that variable SGLang runs norms, rotary embedding, routing and experts in plain torch, as float32 needs: its compiled RMSNorm takes 16
bits only. Three things stay: the fused norm of queries and keys and the fused K/V write, which SGLang would first compile (and, in
float32, fail to), and the plain experts, which do not know expert parallelism.
"""

from __future__ import annotations

from typing import Any

UNUSED = ("sglang.srt.models.utils.can_use_fused_inplace_qknorm", "sglang.srt.mem_cache.memory_pool.can_use_store_cache")
"""SGLang asks these whether a fused kernel is there, and does without where it is not."""
EXPERTS = "sglang.srt.layers.moe.fused_moe_native.moe_forward_native"


def register() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from sglang_dcp.cpu.experts import forward_local_experts

    for target in UNUSED:
        HookRegistry.register(target, _is_not_there, HookType.REPLACE)
    HookRegistry.register(EXPERTS, forward_local_experts, HookType.REPLACE)


def _is_not_there(*_args: Any, **_kwargs: Any) -> bool:
    return False
