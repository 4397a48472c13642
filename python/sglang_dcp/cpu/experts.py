"""The experts of a MoE layer on one expert-parallel rank, in plain torch."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional


def forward_local_experts(layer: Any, x: torch.Tensor, topk_output: Any, moe_runner_config: Any) -> torch.Tensor:
    """Replaces layers.moe.fused_moe_native.moe_forward_native, which scatters with expert ids and so cannot take the -1 that
    expert parallelism gives to experts of other ranks.

    x [tokens, hidden]; topk_output: (weights [tokens, k], ids [tokens, k] local to this rank or -1, router logits).
    Returns this rank's part of the sum, [tokens, hidden]; SGLang adds up the ranks. Gated SiLU without bias only.
    """
    _refuse_unsupported(layer, moe_runner_config)
    weights, expert_ids, _ = topk_output
    result = torch.zeros_like(x)
    for expert in range(layer.w13_weight.shape[0]):
        token, choice = (expert_ids == expert).nonzero(as_tuple=True)
        if token.numel() == 0:
            continue
        gate, up = functional.linear(x[token], layer.w13_weight[expert]).chunk(2, dim=-1)
        out = functional.linear(functional.silu(gate) * up, layer.w2_weight[expert])
        result.index_add_(0, token, out * weights[token, choice].unsqueeze(-1).to(out.dtype))
    return result


def _refuse_unsupported(layer: Any, config: Any) -> None:
    if config.activation != "silu":
        raise NotImplementedError(f"experts on the CPU: activation {config.activation!r} is not supported, only 'silu'")
    if config.apply_router_weight_on_input or config.gemm1_alpha is not None:
        raise NotImplementedError("experts on the CPU: router weight on the input and clamped SwiGLU are not supported")
    if getattr(layer, "w13_weight_bias", None) is not None or getattr(layer, "w2_weight_bias", None) is not None:
        raise NotImplementedError("experts on the CPU: bias is not supported")
