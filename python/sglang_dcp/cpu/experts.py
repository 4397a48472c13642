"""The experts of a MoE layer on one expert-parallel rank, in plain torch."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional


def forward_local_experts(layer: Any, x: torch.Tensor, topk_output: Any, moe_runner_config: Any) -> torch.Tensor:
    """Replaces layers.moe.fused_moe_native.moe_forward_native, which scatters with expert ids and so cannot take the -1 that
    expert parallelism gives to experts of other ranks.

    x [tokens, hidden]; topk_output: (weights [tokens, k], ids [tokens, k] local to this rank or -1, router logits).
    Returns this rank's part of the sum, [tokens, hidden]; SGLang adds up the ranks. Gated SiLU, or gpt-oss's clamped form of it.
    """
    _refuse_unsupported(moe_runner_config)
    weights, expert_ids, _ = topk_output
    result = torch.zeros_like(x)
    for expert in range(layer.w13_weight.shape[0]):
        token, choice = (expert_ids == expert).nonzero(as_tuple=True)
        if token.numel() == 0:
            continue
        gate_up = functional.linear(x[token], layer.w13_weight[expert], _bias(layer, "w13_weight_bias", expert, x.dtype))
        inner = _activated(gate_up, moe_runner_config)
        out = functional.linear(inner, layer.w2_weight[expert], _bias(layer, "w2_weight_bias", expert, x.dtype))
        result.index_add_(0, token, out * weights[token, choice].unsqueeze(-1).to(out.dtype))
    return result


def _bias(layer: Any, name: str, expert: int, dtype: torch.dtype) -> torch.Tensor | None:
    """Of one expert; SGLang keeps them in float32."""
    bias = getattr(layer, name, None)
    return None if bias is None else bias[expert].to(dtype)


def _activated(gate_up: torch.Tensor, config: Any) -> torch.Tensor:
    """gate_up [tokens, 2 * width]: gates first, or each beside its up where there is an alpha (gpt-oss). Returns [tokens, width]."""
    if config.gemm1_alpha is None:
        gate, up = gate_up.chunk(2, dim=-1)
        return functional.silu(gate) * up
    limit = config.gemm1_clamp_limit
    gate, up = gate_up[..., ::2].clamp(max=limit), gate_up[..., 1::2].clamp(-limit, limit)
    return gate * torch.sigmoid(config.gemm1_alpha * gate) * (up + 1)


def _refuse_unsupported(config: Any) -> None:
    if config.activation != "silu":
        raise NotImplementedError(f"experts on the CPU: activation {config.activation!r} is not supported, only 'silu'")
    if config.apply_router_weight_on_input:
        raise NotImplementedError("experts on the CPU: router weight on the input is not supported")
    # SGLang clamps in other ways too: without an alpha, or gates first.
    if config.swiglu_limit is not None or (config.gemm1_alpha is None) != (config.gemm1_clamp_limit is None):
        raise NotImplementedError("experts on the CPU: clamped SwiGLU is supported with gemm1_alpha and gemm1_clamp_limit alone")
    if config.gemm1_alpha is not None and not config.gate_up_interleaved:
        raise NotImplementedError("experts on the CPU: clamped SwiGLU is supported with each gate beside its up alone")
