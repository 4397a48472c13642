"""SGLang plugin for tests: every attention layer has K/V scales, as from a checkpoint calibrated for FP8 K/V. Stock and ours get the same.

They are neither 1 nor each other: a scale that is forgotten, or applied twice, or to the other of the two, shows.
"""

from __future__ import annotations

from typing import Any

KEY_SCALE, VALUE_SCALE = 0.5, 2.0


def register() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register("sglang.srt.layers.radix_attention.RadixAttention.__init__", _give_scales, HookType.AFTER)


def _give_scales(result: Any, layer: Any, *_args: Any, **_kwargs: Any) -> None:
    import torch

    layer.k_scale, layer.v_scale = (
        torch.nn.Parameter(torch.tensor(scale, dtype=torch.float32), requires_grad=False) for scale in (KEY_SCALE, VALUE_SCALE)
    )
    layer.k_scale_float, layer.v_scale_float = KEY_SCALE, VALUE_SCALE
