"""The attention layers that may be sharded: an allow-list, checked when the model is loaded."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

logger = logging.getLogger(__name__)

SERVED_CLASSES = {
    "Qwen2MoeAttention": "qwen2_moe",
    "Qwen3MoeAttention": "qwen3_moe",
    "Glm4MoeAttention": "glm4_moe",
    "BailingMoEAttention": "bailing_moe",
    "DeepseekV2AttentionMLA": "deepseek_v2",
    "GptOssAttention": "gpt_oss",
    "Step3p5Attention": "step3p5",
}
"""Attention classes by the module of sglang.srt.models that they stand in: some names stand in several, for different attention."""

WINDOW_CLASSES = ("GptOssAttention", "Step3p5Attention")
"""Of these, some layers may attend a window; and of those, a sink may be handed to the backend in every call."""
SINK_CLASSES = ("GptOssAttention",)

WINDOW_MODELS = ("GptOssForCausalLM", "Step3p5ForCausalLM")
"""Models with window layers, of which SGLang keeps the K/V in a pool of its own."""

TRIED_MODELS = (
    "Qwen2MoeForCausalLM",
    "Qwen3MoeForCausalLM",
    "Glm4MoeForCausalLM",
    "BailingMoEForCausalLM",
    "BailingMoeForCausalLM",
    "BailingMoeV2ForCausalLM",
    "DeepseekV2ForCausalLM",
    "DeepseekV3ForCausalLM",
    "Glm4MoeLiteForCausalLM",
    "LongcatFlashForCausalLM",
    "MistralLarge3ForCausalLM",
    *WINDOW_MODELS,
)
"""Models whose attention was recomputed from two halves of a pool (test/upstream/test_served_models.py), or a bare alias of one. Others
may own a served class too: they are served with a warning."""

SINKS = ("sinks", "attn_sink", "attention_sink_bias", "learnable_sink_param")

STATEFUL_LAYERS = ("RadixLinearAttention", "MambaMixer", "MambaMixer2", "ShortConv")
"""Layers whose state is not a list of KV pages."""


class UnsupportedModelError(RuntimeError):
    """A layer that dynamic context parallelism does not serve; the message names it and the reason."""


def window_of(layer: Any) -> int | None:
    """How many tokens before itself a token of this RadixAttention sees; None: all."""
    size = layer.sliding_window_size
    return int(size) if size is not None and size > -1 else None


def attention_modules(model: Any) -> Iterator[tuple[str, Any]]:
    """What attends: names and RadixAttention layers of a torch module."""
    return ((name, module) for name, module in model.named_modules() if type(module).__name__ == "RadixAttention")


def attention_layers(model: Any) -> dict[int, str]:
    """Names of the layers that attend, by layer id. MLA has two forms of one layer under one id, of which a step runs one."""
    names: dict[int, str] = {}
    for name, layer in attention_modules(model):
        names[layer.layer_id] = name.rpartition(".")[0] or name
    return names


def find_unsupported_layer(model: Any) -> str | None:
    """The first attention layer that is not served, as "NAME (CLASS): REASON", or None. `model`: a torch module."""
    modules = dict(model.named_modules())
    num_layers = 0
    for name, module in modules.items():
        if type(module).__name__ in STATEFUL_LAYERS:
            return f"{name} ({type(module).__name__}): it keeps a state instead of KV pages"
        if type(module).__name__ != "RadixAttention":
            continue
        num_layers += 1
        owner_name = name.rpartition(".")[0]
        owner = modules[owner_name]
        reason = _reason_against(owner, module)
        if reason is not None:
            return f"{owner_name or name} ({type(owner).__name__}): {reason}"
    return None if num_layers else f"{type(model).__name__}: it has no RadixAttention layer"


def _reason_against(owner: Any, layer: Any) -> str | None:
    if layer.is_cross_attention:
        return "cross attention reads another sequence"
    attention_type = getattr(layer.attn_type, "value", layer.attn_type)
    if attention_type != "decoder":
        return f"attention type {attention_type!r} is not causal"
    if window_of(layer) is not None and type(owner).__name__ not in WINDOW_CLASSES:
        return f"sliding window of {layer.sliding_window_size} tokens"
    if layer.logit_cap:
        return f"logit cap {layer.logit_cap}"
    if getattr(layer, "use_irope", False):
        return "chunked local attention"
    if type(owner).__name__ not in SINK_CLASSES and any(getattr(part, name, None) is not None for part in (owner, layer) for name in SINKS):
        return "attention sinks"
    if getattr(owner, "use_dsa", False) or getattr(owner, "indexer", None) is not None:
        return "sparse attention picks tokens by an index of its own"
    module = SERVED_CLASSES.get(type(owner).__name__)
    if module is None or type(owner).__module__ != f"sglang.srt.models.{module}":
        return f"not tested; served are {', '.join(SERVED_CLASSES)}"
    return None


def check_model(model: Any) -> None:
    """Raises UnsupportedModelError naming the first layer that is not served. Warns of a model that nobody tried."""
    problem = find_unsupported_layer(model)
    if problem is not None:
        raise UnsupportedModelError(f"--enable-dyncp does not serve this model: layer {problem}")
    if type(model).__name__ not in TRIED_MODELS:
        logger.warning(
            "dyncp: %s was not tried with --enable-dyncp, though its attention layers are of a served class; compare its answers with "
            "those of a server without the flag",
            type(model).__name__,
        )
