"""Models with the layers of real ones, few of them, without weights: SGLang fills them (`--load-format dummy`)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from benchmark.multi_gpu.settings import ROOT

TOKENIZER = ROOT / "testing" / "models" / "qwen3moe"
LONGEST_CONTEXT = 1_100_000
COMMON: dict[str, Any] = {
    # The test tokenizer's: one byte is one token, so that any output token has a text. The layers are what is measured.
    "vocab_size": 259,
    "max_position_embeddings": LONGEST_CONTEXT,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "eos_token_id": 257,
    "bos_token_id": 256,
    "torch_dtype": "bfloat16",
}
QWEN3_MOE: dict[str, Any] = COMMON | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "rope_theta": 1e6,
}
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-235b-a22b": QWEN3_MOE
    | {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "moe_intermediate_size": 1536,
        "num_attention_heads": 64,
    },
    "deepseek-v3": COMMON
    | {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "kv_lora_rank": 512,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "n_group": 8,
        "topk_group": 4,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "rope_theta": 1e4,
    },
}


SMALL_SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-30b-a3b": QWEN3_MOE
    | {
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_attention_heads": 32,
    },
}
"""Small enough for many layers on one card: for measurements where the GPU must set the step (benchmark/gpu_runtime)."""


def write_shape(name: str, num_layers: int, folder: Path) -> Path:
    """Writes configuration and tokenizer to folder/name. What is there already stays untouched: a server may be reading it."""
    target, config = (
        folder / f"{name}-{num_layers}",
        json.dumps((SHAPES | SMALL_SHAPES)[name] | {"num_hidden_layers": num_layers}, indent=1),
    )
    if (target / "config.json").is_file() and (target / "config.json").read_text() == config:
        return target
    target.mkdir(parents=True, exist_ok=True)
    (target / "config.json").write_text(config)
    for part in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / part, target / part)
    return target


def model_flags(name: str) -> tuple[str, ...]:
    """As the runtime's own check starts MLA models on a GPU."""
    return ("--flashinfer-mla-disable-ragged",) if name == "deepseek-v3" else ()
