"""Small models with window layers: gpt-oss's form (sinks, heads of 64) and Step-3.5's (more heads in window layers). Configurations and
the shapes of their weights, as random_models.py writes them."""

from __future__ import annotations

from typing import Any

Shapes = dict[str, tuple[int, ...]]

WINDOW = 128
LAYER_TYPES = ["sliding_attention", "full_attention"] * 2

OSS: dict[str, Any] = {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "hidden_size": 512,
    "intermediate_size": 256,
    "num_hidden_layers": len(LAYER_TYPES),
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_local_experts": 4,
    "num_experts_per_tok": 4,
    "layer_types": LAYER_TYPES,
    "sliding_window": WINDOW,
    "swiglu_limit": 7.0,
    "attention_bias": True,
    "rope_parameters": {
        "rope_type": "yarn",
        "factor": 4.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
        "rope_theta": 150000.0,
    },
}
STEP_CONFIGURATION = "from sglang.srt.configs.step3p5 import Step3p5Config\n"
"""Beside the weights, as the real checkpoint brings a file of its own: transformers 5.19 knows the name too, and its class cannot be read
where layers differ in heads (findings/transformers_heads_by_layer.sh)."""
STEP: dict[str, Any] = {
    "architectures": ["Step3p5ForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_step3p5.Step3p5Config"},
    "model_type": "step3p5",
    "hidden_size": 512,
    "intermediate_size": 512,
    "num_hidden_layers": len(LAYER_TYPES),
    "num_attention_heads": 8,
    "num_attention_groups": 2,
    "attention_other_setting": {"num_attention_heads": 12, "num_attention_groups": 2},
    "head_dim": 128,
    "layer_types": LAYER_TYPES,
    "sliding_window": WINDOW,
    "moe_layers_enum": "1,2,3",
    "moe_num_experts": 4,
    "moe_top_k": 4,
    "moe_intermediate_size": 256,
    "moe_router_scaling_factor": 1.0,
    "share_expert_dims": 256,
    "need_fp32_gate": False,
    "use_moe_router_bias": True,
    "use_head_wise_attn_gate": True,
    "swiglu_limits": [0.0] * len(LAYER_TYPES),
    "swiglu_limits_shared": [0.0] * len(LAYER_TYPES),
    "rope_theta": [1e6] * len(LAYER_TYPES),
    "partial_rotary_factors": [1.0] * len(LAYER_TYPES),
    "rope_scaling": None,
    "yarn_only_types": [],
}


def oss_layer_shapes(config: dict[str, Any], layer: int) -> Shapes:
    """Weights of one layer but its norms, behind its prefix."""
    hidden, width, experts = config["hidden_size"], config["intermediate_size"], config["num_local_experts"]
    queries, keys = (config[name] * config["head_dim"] for name in ("num_attention_heads", "num_key_value_heads"))
    projections = {"q_proj": (queries, hidden), "k_proj": (keys, hidden), "v_proj": (keys, hidden), "o_proj": (hidden, queries)}
    shapes: Shapes = {"self_attn.sinks": (config["num_attention_heads"],)}
    for name, shape in projections.items():
        shapes |= {f"self_attn.{name}.weight": shape, f"self_attn.{name}.bias": shape[:1]}
    shapes |= {"mlp.router.weight": (experts, hidden), "mlp.router.bias": (experts,)}
    # Experts' matrices stand the other way round: [experts, in, out].
    shapes |= {"mlp.experts.gate_up_proj": (experts, hidden, 2 * width), "mlp.experts.gate_up_proj_bias": (experts, 2 * width)}
    return shapes | {"mlp.experts.down_proj": (experts, width, hidden), "mlp.experts.down_proj_bias": (experts, hidden)}


def step_layer_shapes(config: dict[str, Any], layer: int) -> Shapes:
    """As oss_layer_shapes."""
    hidden, dim, experts = config["hidden_size"], config["head_dim"], config["moe_num_experts"]
    is_window = config["layer_types"][layer] == "sliding_attention"
    heads = (config["attention_other_setting"] if is_window else config)["num_attention_heads"]
    keys = config["num_attention_groups"] * dim
    projections = {"q_proj": (heads * dim, hidden), "k_proj": (keys, hidden), "v_proj": (keys, hidden), "o_proj": (hidden, heads * dim)}
    projections |= {"g_proj": (heads, hidden), "q_norm": (dim,), "k_norm": (dim,)}
    shapes: Shapes = {f"self_attn.{name}": shape for name, shape in projections.items()}
    if str(layer) not in config["moe_layers_enum"].split(","):
        shapes |= gated("mlp.", hidden, config["intermediate_size"])
    else:
        of_experts = gated("moe.", hidden, config["moe_intermediate_size"])
        shapes |= {name: (experts, *shape) for name, shape in of_experts.items()}
        shapes |= {"moe.gate": (experts, hidden), "moe.router_bias": (experts,)}
        shapes |= gated("share_expert.", hidden, config["share_expert_dims"])
    return {name if name.endswith("bias") else f"{name}.weight": shape for name, shape in shapes.items()}


def gated(prefix: str, hidden: int, width: int) -> Shapes:
    """Of a gated feed-forward part."""
    return {f"{prefix}gate_proj": (width, hidden), f"{prefix}up_proj": (width, hidden), f"{prefix}down_proj": (hidden, width)}
