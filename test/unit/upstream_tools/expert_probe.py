"""What the patched SGLang does with experts that lie on several ranks. Part of seam_probe.py."""

import types

import torch


def expert_layer(weights13, weights2, num_experts):
    return types.SimpleNamespace(num_experts=num_experts, w13_weight=weights13, w2_weight=weights2)


def experts_of_two_ranks_add_up():
    from sglang.srt.layers.moe.fused_moe_native import moe_forward_native

    config = types.SimpleNamespace(
        apply_router_weight_on_input=False, activation="silu", gemm1_alpha=None, gemm1_clamp_limit=None, swiglu_limit=None
    )
    generator = torch.Generator().manual_seed(0)
    weights13, weights2 = torch.randn(4, 8, 6, generator=generator), torch.randn(4, 6, 4, generator=generator)
    tokens, weights = torch.randn(5, 6, generator=generator), torch.rand(5, 2, generator=generator)
    ids = torch.tensor([[0, 3], [1, 2], [2, 3], [0, 1], [3, 2]])
    whole = moe_forward_native(expert_layer(weights13, weights2, 4), tokens, (weights, ids, None), config)
    total = torch.zeros_like(whole)
    for first in (0, 2):
        local = torch.where((ids >= first) & (ids < first + 2), ids - first, -1)
        layer = expert_layer(weights13[first : first + 2], weights2[first : first + 2], 4)
        total += moe_forward_native(layer, tokens, (weights, local, None), config)
    return bool(torch.allclose(whole, total, atol=1e-5))


def fused_experts_of_two_ranks_are_the_checkpoint():
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE

    class Layer(FusedMoE):
        """The parts that its loader reads."""

        def __init__(self, rank, ranks):
            torch.nn.Module.__init__(self)
            counts = {"num_experts": 4, "num_local_experts": 4 // ranks, "num_fused_shared_experts": 0}
            places = {"moe_ep_rank": rank, "moe_ep_size": ranks, "moe_tp_rank": 0, "moe_tp_size": 1, "layer_id": 0}
            switches = ("use_triton_kernels", "use_presharded_weights", "use_padded_loading", "use_flashinfer_trtllm_moe")
            nothing = dict.fromkeys(("quant_config", "quant_method", "scheme", "moe_runner_config"))
            vars(self).update(counts | places | dict.fromkeys(switches, False) | nothing, uses_expert_location=False)

    checkpoint = torch.arange(4 * 6 * 5.0).reshape(4, 6, 5)

    def loaded(ranks):
        parts = []
        for rank in range(ranks):
            parts.append(torch.nn.Parameter(torch.empty(4 // ranks, 6, 5), requires_grad=False))
            Layer(rank, ranks).weight_loader_fused(parts[-1], checkpoint, "w13_weight", shard_id="w13")
        return torch.cat([part.data for part in parts])

    return all(torch.equal(loaded(ranks), checkpoint) for ranks in (1, 2, 4))


ATTEMPTS = (experts_of_two_ranks_add_up, fused_experts_of_two_ranks_are_the_checkpoint)
