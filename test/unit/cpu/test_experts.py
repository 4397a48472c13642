"""Experts of one rank: the parts of all ranks add up to the layer as it is written in the model."""

from __future__ import annotations

import types

import pytest
import torch

from sglang_dcp.cpu.experts import forward_local_experts

TOKENS, HIDDEN, INNER, EXPERTS, TOP_K = 13, 8, 6, 8, 2


def config(**changes: object) -> types.SimpleNamespace:
    fields = {"activation": "silu", "apply_router_weight_on_input": False, "gemm1_alpha": None, "gemm1_clamp_limit": None}
    return types.SimpleNamespace(**fields | {"swiglu_limit": None, "gate_up_interleaved": True} | changes)


@pytest.fixture
def layer_inputs() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(TOKENS, HIDDEN, generator=generator)
    w13 = torch.randn(EXPERTS, 2 * INNER, HIDDEN, generator=generator)
    w2 = torch.randn(EXPERTS, HIDDEN, INNER, generator=generator)
    ids = torch.stack([torch.randperm(EXPERTS, generator=generator)[:TOP_K] for _ in range(TOKENS)])
    weights = torch.rand(TOKENS, TOP_K, generator=generator)
    return x, w13, w2, ids, weights


def by_definition(x: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    out = torch.zeros_like(x)
    for token in range(x.shape[0]):
        for expert, weight in zip(ids[token].tolist(), weights[token], strict=True):
            gate, up = w13[expert][:INNER] @ x[token], w13[expert][INNER:] @ x[token]
            out[token] += weight * (w2[expert] @ (gate / (1 + torch.exp(-gate)) * up))
    return out


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_parts_of_all_ranks_add_up(layer_inputs: tuple[torch.Tensor, ...], num_ranks: int) -> None:
    x, w13, w2, ids, weights = layer_inputs
    local = EXPERTS // num_ranks
    total = torch.zeros_like(x)
    for rank in range(num_ranks):
        mine = (ids // local) == rank
        local_ids = torch.where(mine, ids - rank * local, -1)
        layer = types.SimpleNamespace(w13_weight=w13[rank * local : (rank + 1) * local], w2_weight=w2[rank * local : (rank + 1) * local])
        total += forward_local_experts(layer, x, (weights, local_ids, None), config())
    torch.testing.assert_close(total, by_definition(x, w13, w2, ids, weights), rtol=1e-4, atol=1e-4)


def test_no_tokens_and_no_local_expert(layer_inputs: tuple[torch.Tensor, ...]) -> None:
    x, w13, w2, ids, weights = layer_inputs
    layer = types.SimpleNamespace(w13_weight=w13, w2_weight=w2)
    assert forward_local_experts(layer, x[:0], (weights[:0], ids[:0], None), config()).shape == (0, HIDDEN)
    assert torch.equal(forward_local_experts(layer, x, (weights, torch.full_like(ids, -1), None), config()), torch.zeros_like(x))


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_experts_of_gpt_oss(layer_inputs: tuple[torch.Tensor, ...], num_ranks: int) -> None:
    """Biases, gates beside their ups, and a clamped SwiGLU that both limits reach: as transformers has it."""
    from transformers import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    x, _, _, ids, weights = layer_inputs
    x = x * 2
    reference = GptOssExperts(GptOssConfig(num_local_experts=EXPERTS, hidden_size=HIDDEN, intermediate_size=INNER, swiglu_limit=7.0))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        # transformers' experts stand [in, out], SGLang's [out, in].
        expected = reference(x, ids, weights)
        gates_and_ups = torch.einsum("th,ehi->tei", x, reference.gate_up_proj)
    assert gates_and_ups.max() > 7 and gates_and_ups.min() < -7
    w13, w2 = (part.data.transpose(1, 2).contiguous() for part in (reference.gate_up_proj, reference.down_proj))
    parts = {
        "w13_weight": w13,
        "w2_weight": w2,
        "w13_weight_bias": reference.gate_up_proj_bias.data,
        "w2_weight_bias": reference.down_proj_bias.data,
    }
    local, total = EXPERTS // num_ranks, torch.zeros_like(x)
    for rank in range(num_ranks):
        layer = types.SimpleNamespace(**{name: part[rank * local : (rank + 1) * local] for name, part in parts.items()})
        local_ids = torch.where((ids // local) == rank, ids - rank * local, -1)
        total += forward_local_experts(layer, x, (weights, local_ids, None), config(gemm1_alpha=1.702, gemm1_clamp_limit=7.0))
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"activation": "gelu"},
        {"apply_router_weight_on_input": True},
        {"gemm1_alpha": 1.7},
        {"gemm1_clamp_limit": 7.0},
        {"swiglu_limit": 7.0},
        {"gemm1_alpha": 1.7, "gemm1_clamp_limit": 7.0, "gate_up_interleaved": False},
    ],
)
def test_what_is_not_supported_is_refused(layer_inputs: tuple[torch.Tensor, ...], changes: dict[str, object]) -> None:
    x, w13, w2, ids, weights = layer_inputs
    layer = types.SimpleNamespace(w13_weight=w13, w2_weight=w2)
    with pytest.raises(NotImplementedError, match="experts on the CPU"):
        forward_local_experts(layer, x, (weights, ids, None), config(**changes))
