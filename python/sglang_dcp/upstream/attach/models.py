"""The attention layers that may be sharded: an allow-list, checked when the model is loaded."""

from __future__ import annotations

from typing import Any

SERVED_CLASSES = ("Qwen2MoeAttention", "Qwen3MoeAttention", "DeepseekV2AttentionMLA")

STATEFUL_LAYERS = ("RadixLinearAttention", "MambaMixer", "MambaMixer2", "ShortConv")
"""Layers whose state is not a list of KV pages."""


class UnsupportedModelError(RuntimeError):
    """A layer that dynamic context parallelism does not serve; the message names it and the reason."""


def attention_layers(model: Any) -> dict[int, str]:
    """Names of the layers that attend, by layer id. MLA has two forms of one layer under one id, of which a step runs one."""
    names: dict[int, str] = {}
    for name, module in model.named_modules():
        if type(module).__name__ == "RadixAttention":
            names[module.layer_id] = name.rpartition(".")[0] or name
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
    if layer.sliding_window_size is not None and layer.sliding_window_size > 0:
        return f"sliding window of {layer.sliding_window_size} tokens"
    if layer.logit_cap:
        return f"logit cap {layer.logit_cap}"
    if getattr(layer, "use_irope", False):
        return "chunked local attention"
    if any(getattr(part, name, None) is not None for part in (owner, layer) for name in ("sinks", "attn_sink", "attention_sink_bias")):
        return "attention sinks"
    if getattr(owner, "use_dsa", False) or getattr(owner, "indexer", None) is not None:
        return "sparse attention picks tokens by an index of its own"
    if type(owner).__name__ not in SERVED_CLASSES:
        return f"not tested; served are {', '.join(SERVED_CLASSES)}"
    return None


def check_model(model: Any) -> None:
    """Raises UnsupportedModelError naming the first layer that is not served."""
    problem = find_unsupported_layer(model)
    if problem is not None:
        raise UnsupportedModelError(f"--enable-dyncp does not serve this model: layer {problem}")
