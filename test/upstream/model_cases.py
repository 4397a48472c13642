"""Tiny models of SGLang's classes: what test_served_models.py builds on the CPU, in the words of each model's config.json."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BASE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 320,
    "max_position_embeddings": 4096,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "eos_token_id": 257,
    "bos_token_id": 256,
    "pad_token_id": 258,
    "torch_dtype": "float32",
}
GQA = BASE | {"num_key_value_heads": 2, "head_dim": 16, "attention_bias": False, "rope_theta": 10000.0}
MLA = BASE | {
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "rope_theta": 10000.0,
    "attention_bias": False,
    # SGLang's rope of this class on a CPU knows yarn only (test_cpu_gaps.py).
    "rope_scaling": {
        "type": "yarn",
        "rope_type": "yarn",
        "factor": 2.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 2048,
        "beta_fast": 32,
        "beta_slow": 1,
    },
}
EXPERTS = {"num_experts": 8, "n_routed_experts": 8, "num_local_experts": 8}


WINDOW = 9
LAYER_TYPES = ["sliding_attention", "full_attention"]
STEP: dict[str, Any] = {
    "num_attention_groups": 2,
    "attention_other_setting": {"num_attention_heads": 4, "num_attention_groups": 2},
    "layer_types": LAYER_TYPES,
    "sliding_window": WINDOW,
    "moe_layers_enum": "1",
    "moe_num_experts": 8,
    "moe_top_k": 2,
    "moe_router_scaling_factor": 1.0,
    "share_expert_dims": 32,
    "need_fp32_gate": False,
    "use_moe_router_bias": True,
    "use_head_wise_attn_gate": True,
    "swiglu_limits": [0.0, 0.0],
    "swiglu_limits_shared": [0.0, 0.0],
    "rope_theta": [1e4, 1e4],
    "partial_rotary_factors": [1.0, 1.0],
    "rope_scaling": None,
    "yarn_only_types": [],
}
GPT_OSS: dict[str, Any] = {
    "layer_types": LAYER_TYPES,
    "sliding_window": WINDOW,
    "swiglu_limit": 7.0,
    "attention_bias": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}


@dataclass(frozen=True)
class ModelCase:
    """architecture: as config.json names it. attention: the class that owns its RadixAttention. latent: MLA. fields: of its config."""

    architecture: str
    model_type: str
    attention: str
    latent: bool = False
    fields: dict[str, Any] = field(default_factory=dict)

    def config(self) -> dict[str, Any]:
        names = {"architectures": [self.architecture], "model_type": self.model_type}
        return (MLA if self.latent else GQA | EXPERTS) | self.fields | names


def has_sinks(folder: Path) -> bool:
    """Of a checkpoint: whether SGLang serves it on any CPU with testing/gpu/sinks_on_cpu alone."""
    return bool(json.loads((folder / "config.json").read_text())["model_type"] == "gpt_oss")


def _latent(architecture: str, model_type: str, **fields: Any) -> ModelCase:
    return ModelCase(architecture, model_type, "DeepseekV2AttentionMLA", latent=True, fields=fields)


CASES = (
    ModelCase(
        "Qwen2MoeForCausalLM",
        "qwen2_moe",
        "Qwen2MoeAttention",
        # Its shared expert's gate is a Triton kernel.
        fields={"shared_expert_intermediate_size": 0, "decoder_sparse_step": 1},
    ),
    ModelCase("Qwen3MoeForCausalLM", "qwen3_moe", "Qwen3MoeAttention", fields={"decoder_sparse_step": 1, "mlp_only_layers": []}),
    ModelCase(
        "Glm4MoeForCausalLM",
        "glm4_moe",
        "Glm4MoeAttention",
        fields={
            "use_qk_norm": True,
            "partial_rotary_factor": 0.5,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": True,
            "routed_scaling_factor": 1.0,
        },
    ),
    ModelCase(
        "MiniMaxM2ForCausalLM",
        "minimax_m2",
        "MiniMaxM2Attention",
        # Its norm of queries and keys is a CUDA kernel.
        fields={"rotary_dim": 8, "use_qk_norm": False, "scoring_func": "sigmoid", "use_routing_bias": True},
    ),
    ModelCase(
        "BailingMoeV2ForCausalLM",
        "bailing_moe_v2",
        "BailingMoEAttention",
        fields={
            "use_bias": False,
            "use_qkv_bias": False,
            "use_qk_norm": True,
            "partial_rotary_factor": 0.5,
            "num_shared_experts": 1,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": True,
            "routed_scaling_factor": 1.0,
            "embedding_dropout": 0.0,
            "norm_head": False,
            "score_function": "sigmoid",
            "moe_router_enable_expert_bias": True,
        },
    ),
    ModelCase("MixtralForCausalLM", "mixtral", "MixtralAttention", fields={"sliding_window": None}),
    ModelCase("OlmoeForCausalLM", "olmoe", "OlmoeAttention", fields={"num_key_value_heads": 4, "norm_topk_prob": False}),
    ModelCase("PhiMoEForCausalLM", "phimoe", "PhiMoEAttention", fields={"lm_head_bias": True}),
    ModelCase(
        "Ernie4_5_MoeForCausalLM",
        "ernie4_5_moe",
        "LlamaAttention",
        fields={
            "moe_num_experts": 8,
            "moe_k": 2,
            "moe_layer_start_index": 1,
            "moe_layer_end_index": 1,
            "moe_layer_interval": 1,
            "moe_num_shared_experts": 1,
            "use_bias": False,
        },
    ),
    ModelCase(
        "HunYuanMoEV1ForCausalLM",
        "hunyuan_v1_moe",
        "HunYuanAttention",
        fields={"moe_topk": 2, "num_shared_expert": 1, "use_qk_norm": False, "use_mixed_mlp_moe": True},
    ),
    ModelCase("Step3p5ForCausalLM", "step3p5", "Step3p5Attention", fields=STEP),
    ModelCase("GptOssForCausalLM", "gpt_oss", "GptOssAttention", fields=GPT_OSS),
    _latent("DeepseekV3ForCausalLM", "deepseek_v3"),
    _latent("MistralLarge3ForCausalLM", "deepseek_v3"),
    _latent("Glm4MoeLiteForCausalLM", "glm4_moe_lite"),
    _latent(
        "LongcatFlashForCausalLM",
        "longcat_flash",
        num_layers=2,
        ffn_hidden_size=64,
        expert_ffn_hidden_size=32,
        moe_topk=2,
        # Zero experts are chosen by a Triton kernel.
        zero_expert_num=0,
        zero_expert_type=None,
        mla_scale_q_lora=True,
        mla_scale_kv_lora=True,
        router_bias=False,
    ),
)
"""Kimi-K2's architecture is DeepseekV3ForCausalLM."""
