"""Small models of the sizes that GPU kernels want, with seeded random weights in bfloat16 that make attention matter.

Every token takes all experts: routing by a top-k would turn a rounding difference into another expert, and hide or fake an error.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch

from testing.gpu.window_models import OSS, STEP, STEP_CONFIGURATION, gated, oss_layer_shapes, step_layer_shapes
from testing.recall import MODELS

TOKENIZER_FOLDER = MODELS / "qwen3moe"
COMMON: dict[str, Any] = {
    "vocab_size": 320,
    "max_position_embeddings": 16384,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "eos_token_id": 257,
    "bos_token_id": 256,
    "torch_dtype": "bfloat16",
}
GQA: dict[str, Any] = COMMON | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 512,
    "intermediate_size": 512,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "num_experts": 4,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "rope_theta": 1e6,
}
MLA: dict[str, Any] = COMMON | {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "hidden_size": 512,
    "intermediate_size": 512,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "kv_lora_rank": 512,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "greedy",
    "scoring_func": "softmax",
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "rope_theta": 1e4,
    "rope_scaling": {
        "type": "yarn",
        "factor": 4,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32,
        "beta_slow": 1,
    },
}
GQA_WIDE: dict[str, Any] = GQA | {
    # DeepEP's low-latency kernels know few hidden sizes, of which this is the smallest.
    "hidden_size": 2048,
    "moe_intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_experts": 8,
    "num_experts_per_tok": 8,
}
MODELS = {"gqa": GQA, "mla": MLA, "gqa_wide": GQA_WIDE, "oss": COMMON | OSS, "step": COMMON | STEP}
WINDOW_LAYERS = {"gpt_oss": oss_layer_shapes, "step3p5": step_layer_shapes}
"""Shapes of a layer's weights, by model type."""
KEY_SCALE = 2.0
"""Of query and key norms: attention over random keys is flat without it, and a lost shard would hardly show."""


def write_model(name: str, folder: Path, num_layers: int | None = None, num_experts: int | None = None) -> Path:
    """Writes model `name` to folder/name: configuration, tokenizer and weights. The same arguments give the same weights.

    num_layers, num_experts: other than its own, in folder/name_Nlayers_Mexperts. Every token takes all experts.
    """
    from safetensors.torch import save_file

    config, target = MODELS[name], folder / name
    if num_layers is not None:
        config, target = config | {"num_hidden_layers": num_layers}, target.with_name(f"{target.name}_{num_layers}layers")
    if num_experts is not None:
        key = "num_experts" if "num_experts" in config else "n_routed_experts"
        config = config | {key: num_experts, "num_experts_per_tok": num_experts}
        target = target.with_name(f"{target.name}_{num_experts}experts")
    target.mkdir(parents=True, exist_ok=True)
    (target / "config.json").write_text(json.dumps(config, indent=1))
    if config["model_type"] == "step3p5":
        (target / "configuration_step3p5.py").write_text(STEP_CONFIGURATION)
    for part in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER_FOLDER / part, target / part)
    generator = torch.Generator().manual_seed(20261124)
    weights = {key: _weight(key, shape, generator) for key, shape in weight_shapes(config).items()}
    if config["model_type"] == "step3p5":  # its norms weigh one more than they say
        weights = {key: weight - 1 if key.endswith("norm.weight") else weight for key, weight in weights.items()}
    save_file(weights, target / "model.safetensors")
    return target


def weight_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {"lm_head.weight": (vocabulary, hidden), "model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        shapes |= {f"{prefix}{norm}_layernorm.weight": (hidden,) for norm in ("input", "post_attention")}
        if config["model_type"] in WINDOW_LAYERS:
            shapes |= {prefix + name: shape for name, shape in WINDOW_LAYERS[config["model_type"]](config, layer).items()}
            continue
        attention = _mla_shapes(config) if "kv_lora_rank" in config else _gqa_shapes(config)
        shapes |= {f"{prefix}self_attn.{part}.weight": shape for part, shape in attention.items()}
        dense = layer < config.get("first_k_dense_replace", 0)
        shapes |= {f"{prefix}mlp.{part}.weight": shape for part, shape in _feed_forward_shapes(config, dense).items()}
    return shapes | {"model.norm.weight": (hidden,)}


def _gqa_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, dim = config["hidden_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    projections = {"q_proj": (queries, hidden), "k_proj": (keys, hidden), "v_proj": (keys, hidden), "o_proj": (hidden, queries)}
    return projections | {"q_norm": (dim,), "k_norm": (dim,)}


def _mla_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, heads, latent, rotary = (config[key] for key in ("hidden_size", "num_attention_heads", "kv_lora_rank", "qk_rope_head_dim"))
    nope, value = config["qk_nope_head_dim"], config["v_head_dim"]
    return {
        "q_proj": (heads * (nope + rotary), hidden),
        "kv_a_proj_with_mqa": (latent + rotary, hidden),
        "kv_a_layernorm": (latent,),
        "kv_b_proj": (heads * (nope + value), latent),
        "o_proj": (hidden, heads * value),
    }


def _feed_forward_shapes(config: dict[str, Any], dense: bool) -> dict[str, tuple[int, ...]]:
    hidden = config["hidden_size"]
    if dense:
        return gated("", hidden, config["intermediate_size"])
    num_experts = config.get("num_experts") or config["n_routed_experts"]
    shapes: dict[str, tuple[int, ...]] = {"gate": (num_experts, hidden)}
    for expert in range(num_experts):
        shapes |= gated(f"experts.{expert}.", hidden, config["moe_intermediate_size"])
    return shapes | (gated("shared_experts.", hidden, config["moe_intermediate_size"]) if config.get("n_shared_experts") else {})


def _weight(key: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    if key.endswith((".sinks", "bias")):
        # Sinks of about the size of a row's LSE take a share that differs by head; a bias that moves the choice of experts would take some.
        gain = {"sinks": 3.0, "bias": 0.0 if "router" in key else 0.1}[key.rpartition(".")[2].rpartition("_")[2]]
        return (torch.randn(shape, generator=generator) * gain).bfloat16()
    if len(shape) == 1:
        scale = KEY_SCALE if key.endswith(("q_norm.weight", "k_norm.weight", "kv_a_layernorm.weight")) else 1.0
        return torch.full(shape, scale, dtype=torch.bfloat16)
    # Unit gain; embeddings of unit size; logits a few nats apart.
    gain = {"model.embed_tokens.weight": math.sqrt(shape[1]), "lm_head.weight": 2.0}.get(key, 1.0)
    width = shape[1] if ".experts." in key and len(shape) == 3 else shape[-1]
    return (torch.randn(shape, generator=generator) * gain / math.sqrt(width)).bfloat16()
