"""The cost model of what a server serves: constants that ship, brought to the served model's layers and row sizes.

What a step costs per layer follows from few sizes: attention from the K/V width of a token (MLA in absorbed form: from the number of
heads, it is bound by arithmetic), the exchange from bytes per row, experts from the bytes of their weights, MoE's own exchange from hidden
size and experts per token. The element type of the pools changes attention by what was measured, not by its bytes: the kernels that read
FP8 convert it, which takes most of what the bytes save. Standard library only.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from sglang_dcp.policy.attention_table import BFLOAT16, FP8, KV_DTYPES, OUR_SPLIT, table_constants
from sglang_dcp.policy.cost_model import (
    CostModel,
    available_cost_models,
    build_cost_model,
    expert_parallel_size,
    load_cost_model,
    read_constants,
    shipped_attention,
)

CPU_MODEL = "cpu"
CARDS = ("h100", "h200")
FAR_APART = 2.0
"""Beyond this factor a server warns that constants are carried over."""


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What constants depend on. device: "cpu", or the card as its driver names it. Bytes are of one layer, as they lie in memory: of K/V in
    the pool's elements, of queries and partial results in bfloat16, of all experts' weights as the checkpoint has them (0: not known).

    expert_token_share: experts of a token over all experts. window_share: of the layers, those that attend a window alone.
    """

    device: str
    num_layers: int
    num_heads: int
    latent: bool
    kv_bytes_per_token: int
    exchange_bytes_per_row: int
    hidden_size: int
    experts_per_token: int
    kv_element_bytes: int = KV_DTYPES[BFLOAT16]
    expert_bytes: int = 0
    expert_token_share: float = 1.0
    window_share: float = 0.0

    @classmethod
    def of_config(cls, config: Any, device: str, kv_bytes: int = 2) -> ServedModel:
        """From a Hugging Face text configuration. kv_bytes: of an element of K/V in a pool. AttributeError for one without heads or
        layers."""
        heads, hidden = config.num_attention_heads, config.hidden_size
        latent_width = getattr(config, "kv_lora_rank", None)
        if latent_width:
            key, value, kv_width = latent_width + config.qk_rope_head_dim, latent_width, latent_width + config.qk_rope_head_dim
        else:
            key = value = getattr(config, "head_dim", None) or hidden // heads
            kv_width = (_first(config, "num_key_value_heads", "num_attention_groups") or heads) * (key + value)
        per_token = _first(config, "num_experts_per_tok", "moe_topk", "moe_top_k") or 1
        num_experts = _first(config, "num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")
        width = _first(config, "moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size")
        return cls(
            device=device,
            num_layers=config.num_hidden_layers,
            num_heads=heads,
            latent=bool(latent_width),
            kv_bytes_per_token=kv_bytes * kv_width,
            exchange_bytes_per_row=heads * (2 * (key + value) + 4),
            hidden_size=hidden,
            experts_per_token=per_token,
            kv_element_bytes=kv_bytes,
            expert_bytes=int(num_experts * 3 * hidden * width * _weight_bytes(config)),
            expert_token_share=min(1.0, per_token / num_experts) if num_experts else 1.0,
            window_share=_window_share(config),
        )

    @property
    def card(self) -> str:
        """As the constants are named by: "h100", "h200", or the device in small letters."""
        name = self.device.lower()
        return next((card for card in CARDS if card in name), name.replace(" ", "-"))

    @property
    def kv_width(self) -> int:
        """Bytes of K/V of a token and layer, were they bfloat16: by which constants are named."""
        return self.kv_bytes_per_token // self.kv_element_bytes * KV_DTYPES[BFLOAT16]

    @property
    def kv_dtype(self) -> str:
        """As KV_DTYPES names it."""
        return FP8 if self.kv_element_bytes == KV_DTYPES[FP8] else BFLOAT16

    @property
    def attention_size(self) -> int:
        """What a token of attention costs, up to a factor of card and element type: heads, or bytes of K/V as bfloat16 has them."""
        return self.num_heads if self.latent else self.kv_width


def _window_share(config: Any) -> float:
    kinds = list(getattr(config, "layer_types", None) or [])[: config.num_hidden_layers]
    return kinds.count("sliding_attention") / len(kinds) if kinds else 0.0


def _first(config: Any, *names: str) -> int:
    return next((int(value) for value in (getattr(config, name, None) for name in names) if isinstance(value, int)), 0)


def _weight_bytes(config: Any) -> float:
    """Of an element of the experts' weights: what the checkpoint's quantisation says, else bfloat16's."""
    asked = getattr(config, "quantization_config", None) or {}
    asked = asked if isinstance(asked, dict) else vars(asked)
    if isinstance(asked.get("bits"), int):
        return float(asked["bits"]) / 8
    method = str(asked.get("quant_method", "")).lower()
    # Of mxfp4, 32 elements share a scale of a byte.
    return 4.25 / 8 if "mxfp4" in method else 1.0 if "fp8" in method else 2.0


@dataclass(frozen=True, slots=True)
class ServedCost:
    """The cost model of a served model, how it came about (for the log), and what an operator should know of it."""

    model: CostModel
    description: str
    warnings: tuple[str, ...]


def served_cost(given: str | None, served: ServedModel | None, num_instances: int, split: str = OUR_SPLIT) -> ServedCost:
    """`given`: what --dyncp-cost-model names; its constants are taken as they are, with the served model's number of layers. Without it
    the nearest constants that ship for the card are scaled to the served model's sizes; on a CPU, those of the tiny test models are
    taken. served None: nothing is known of the model, and nothing is adapted. split: who splits long rows, as --dyncp-split-budget says."""
    if served is None:
        return ServedCost(load_cost_model(given or CPU_MODEL, num_instances), given or CPU_MODEL, ())
    name = given or nearest_constants(served)
    path, data = read_constants(name)
    model = build_cost_model(path, data, num_instances, serving=True, kv_dtype=served.kv_dtype, split=split)
    layers = f"{model.num_layers} layers there, {served.num_layers} here"
    warnings = []
    if _ratio(model.num_layers, served.num_layers) > FAR_APART:
        warnings.append(f"cost model {name} is of {model.num_layers} layers, the served model has {served.num_layers}: taken per layer")
    measured = _card_attention(data, served, split) if given is None else shipped_attention(path, data, served.kv_dtype, split)
    warnings += _missing_kv_dtype(name, data, served.kv_dtype, measured)
    warnings += _missing_split(name, model, served, split)
    adapted = with_layers(model, served.num_layers)
    if given is not None or "layer" not in data:
        return ServedCost(without_window_layers(adapted, served), f"{name}, {layers}, constants per layer as given", tuple(warnings))
    size = _attention_size(data)
    if _ratio(size, served.attention_size) > FAR_APART:
        warnings.append(f"cost model {name}: attention of a token is scaled by {served.attention_size / size:.3g} to the served model's")
    if served.card not in CARDS:
        warnings.append(f"cost model {name}: no constants for {served.device}")
    scaled = replace(_scaled(adapted, data, served), **measured)
    return ServedCost(without_window_layers(scaled, served), f"{name}, {layers}, scaled to the served model's sizes", tuple(warnings))


def serving_cost(name: str, num_instances: int, kv_dtype: str = BFLOAT16) -> ServedCost:
    """What a server of the model that the constants are of is placed by, for whoever asks without one. Raises as read_constants."""
    path, data = read_constants(name)
    model = build_cost_model(path, data, num_instances, serving=True, kv_dtype=kv_dtype)
    missing = _missing_kv_dtype(name, data, kv_dtype, shipped_attention(path, data, kv_dtype))
    return ServedCost(model, f"{model.name}, K/V in {kv_dtype}", tuple(missing))


def _missing_kv_dtype(name: str, data: dict, kv_dtype: str, measured: dict[str, Any]) -> list[str]:
    if kv_dtype == BFLOAT16 or measured or kv_dtype in data.get("kv_dtypes", {}) or name == CPU_MODEL:
        return []
    return [f"cost model {name} has no constants for K/V in {kv_dtype}: bfloat16's are taken"]


def _missing_split(name: str, model: CostModel, served: ServedModel, split: str) -> list[str]:
    if split == OUR_SPLIT or served.latent or served.device == CPU_MODEL or model.attention_us_per_unsplit_token:
        return []
    return [f"cost model {name} has no constants for --dyncp-split-budget {split}: long rows are priced as if they were split"]


def _card_attention(data: dict, served: ServedModel, split: str) -> dict[str, Any]:
    """What was measured on the constants' card for attention of the served shape."""
    shape: dict[str, Any] = {"latent": served.latent, "num_heads": served.num_heads, "kv_bytes": served.kv_width}
    return table_constants(data["gpu"], **shape, kv_dtype=served.kv_dtype, split=split)


def with_layers(model: CostModel, num_layers: int) -> CostModel:
    """The same constants per layer, for another number of layers. What is of the whole model is brought along."""
    if num_layers == model.num_layers:
        return model
    factor = num_layers / model.num_layers
    return replace(
        model,
        num_layers=num_layers,
        prefill_us_per_token=model.prefill_us_per_token * factor,
        prefill_attention_us_per_token_context=model.prefill_attention_us_per_token_context * factor,
        pool_tokens=None,
    )


def without_window_layers(model: CostModel, served: ServedModel) -> CostModel:
    """The same constants, on average over layers of which some attend a window: there a token of a long row costs nothing."""
    share = 1.0 - served.window_share
    return replace(
        model,
        attention_us_per_token=model.attention_us_per_token * share,
        attention_us_per_unsplit_token=model.attention_us_per_unsplit_token * share,
        prefill_attention_us_per_token_context=model.prefill_attention_us_per_token_context * share,
    )


def nearest_constants(served: ServedModel) -> str:
    """Name of the constants that ship for the card (H100's for an unknown one) and are nearest in size, of the same kind of attention; of
    equal attention, the one whose rows of MoE's exchange are."""
    if served.device == CPU_MODEL:
        return CPU_MODEL
    card = served.card if served.card in CARDS else "h100"
    found: list[tuple[float, float, str]] = []
    for name in available_cost_models():
        _, data = read_constants(name)
        if data["gpu"] == card and data.get("layer", {}).get("latent") == served.latent:
            row = _ratio(data["layer"]["hidden_size"] * data["layer"]["experts_per_token"], served.hidden_size * served.experts_per_token)
            found.append((_ratio(_attention_size(data), served.attention_size), row, name))
    return min(found)[-1]


def _scaled(model: CostModel, data: dict, served: ServedModel) -> CostModel:
    layer = data["layer"]
    attention = served.attention_size / _attention_size(data)
    row = served.exchange_bytes_per_row / layer["exchange_bytes_per_row"]
    expert_row = served.hidden_size * served.experts_per_token / (layer["hidden_size"] * layer["experts_per_token"])
    experts = 1.0
    if served.expert_bytes and "memory" in data:
        # The table's bytes of one GPU are those of its expert-parallel size.
        experts = served.expert_bytes * data["num_layers"] / data["memory"]["expert_weight_bytes"]
        experts *= expert_parallel_size(data, model.num_instances) / model.num_instances
    return replace(
        model,
        expert_weight_us=model.expert_weight_us * experts,
        expert_token_share=served.expert_token_share,
        attention_us_per_token=model.attention_us_per_token * attention,
        exchange_us_per_row=model.exchange_us_per_row * row,
        remote_exchange_us_per_row=model.remote_exchange_us_per_row * row,
        dispatch_us_per_request=model.dispatch_us_per_request * expert_row,
        combine_us_per_request=model.combine_us_per_request * expert_row,
    )


def _attention_size(data: dict) -> int:
    return int(data["layer"]["num_heads"] if data["layer"]["latent"] else data["kv_bytes_per_token_layer"])


def _ratio(one: float, other: float) -> float:
    return max(one, other) / min(one, other)
