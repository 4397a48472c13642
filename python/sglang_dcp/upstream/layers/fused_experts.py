"""Loading experts that a checkpoint holds as one tensor of all of them, as gpt-oss's does in bfloat16."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def load_own_experts(original: Callable[..., None], layer: Any, param: Any, loaded_weight: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    """AROUND FusedMoE.weight_loader_fused, which copies all experts of the checkpoint into a parameter that holds this rank's.

    loaded_weight [experts, ...]; param [experts of this rank, ...]. A tensor that is counted otherwise goes on as it came.
    """
    if holds_a_part(layer, param, loaded_weight):
        count = layer.num_local_experts
        loaded_weight = loaded_weight.narrow(0, layer.moe_ep_rank * count, count)
    original(layer, param, loaded_weight, *args, **kwargs)


def holds_a_part(layer: Any, param: Any, loaded_weight: torch.Tensor) -> bool:
    """Whether the tensor holds every expert of the layer once, and the parameter an even part of them in their order.

    Not so with redundant experts, with a shared expert among them, where ranks may join later, and of a tensor that was cut before.
    """
    count, ranks = layer.num_local_experts, layer.moe_ep_size
    if ranks == 1 or layer.num_fused_shared_experts or count * ranks != layer.num_experts:
        return False
    is_counted = loaded_weight.dim() > 0 and loaded_weight.shape[0] == layer.num_experts and param.shape[0] == count
    return is_counted and not _are_placed_otherwise(layer)


def _are_placed_otherwise(layer: Any) -> bool:
    """Whether SGLang was told to start with experts elsewhere than in the checkpoint's order (--init-expert-location)."""
    from sglang.srt.eplb.expert_location import get_global_expert_location_metadata

    metadata = get_global_expert_location_metadata() if layer.uses_expert_location else None
    if metadata is None:
        return False
    places = metadata.physical_to_logical_map_cpu[layer.layer_id].tolist()
    return bool(places != list(range(layer.num_experts)))
