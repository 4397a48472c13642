"""The allow-list of attention layers, on stand-ins with the attributes that SGLang's layers have."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from sglang_dcp.upstream.attach.models import (
    SERVED_CLASSES,
    TRIED_MODELS,
    UnsupportedModelError,
    attention_layers,
    check_model,
    find_unsupported_layer,
    window_of,
)


class RadixAttention(torch.nn.Module):
    """Stand-in: SGLang's cannot be imported without its platform."""

    def __init__(self, **changes: Any) -> None:
        super().__init__()
        values = {"sliding_window_size": -1, "logit_cap": 0.0, "is_cross_attention": False, "attn_type": "decoder", "use_irope": False}
        for name, value in (values | changes).items():
            setattr(self, name, value)


def model_with(layer: torch.nn.Module, class_name: str = "Qwen3MoeAttention", module: str = "", **owner_attributes: Any) -> torch.nn.Module:
    module = f"sglang.srt.models.{module or SERVED_CLASSES.get(class_name, 'llama')}"
    owner = type(class_name, (torch.nn.Module,), {"__module__": module})()
    owner.attn = layer
    for name, value in owner_attributes.items():
        setattr(owner, name, value)
    block = torch.nn.Module()
    block.self_attn = owner
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList([block])
    return model


@pytest.mark.parametrize("name", SERVED_CLASSES)
def test_served_classes_pass(name: str) -> None:
    check_model(model_with(RadixAttention(), name, use_dsa=False, indexer=None))


@pytest.mark.parametrize(
    ("changes", "owner", "reason"),
    [
        ({"sliding_window_size": 128}, {}, "sliding window of 128"),
        ({"logit_cap": 30.0}, {}, "logit cap 30.0"),
        ({"is_cross_attention": True}, {}, "cross attention"),
        ({"attn_type": "encoder_only"}, {}, "encoder_only"),
        ({"attn_type": "decoder_bidirectional"}, {}, "decoder_bidirectional"),
        ({"use_irope": True}, {}, "chunked local attention"),
        ({}, {"sinks": torch.nn.Parameter(torch.zeros(2))}, "sinks"),
        ({}, {"learnable_sink_param": torch.nn.Parameter(torch.zeros(2))}, "sinks"),
        ({}, {"use_dsa": True}, "sparse attention"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], owner: dict[str, Any], reason: str) -> None:
    problem = find_unsupported_layer(model_with(RadixAttention(**changes), **owner))
    assert problem is not None
    assert problem.startswith("layers.0.self_attn (Qwen3MoeAttention): ")
    assert reason in problem


def test_windows_and_sinks_are_of_the_classes_that_were_tried_with_them() -> None:
    window = RadixAttention(sliding_window_size=127)
    sinks = {"sinks": torch.nn.Parameter(torch.zeros(2))}
    check_model(model_with(window, "GptOssAttention", **sinks))
    check_model(model_with(window, "Step3p5Attention"))
    assert "attention sinks" in str(find_unsupported_layer(model_with(window, "Step3p5Attention", **sinks)))
    assert [window_of(RadixAttention(sliding_window_size=size)) for size in (None, -1, 0, 127)] == [None, None, 0, 127]


def test_another_class_is_refused_by_the_layers_name() -> None:
    with pytest.raises(UnsupportedModelError, match=r"layers.0.self_attn \(LlamaAttention\): not tested; served are Qwen2MoeAttention"):
        check_model(model_with(RadixAttention(), "LlamaAttention"))


def test_another_class_of_the_same_name_is_refused() -> None:
    """SGLang has a BailingMoEAttention in three modules, two of them of models with linear attention."""
    check_model(model_with(RadixAttention(), "BailingMoEAttention"))
    with pytest.raises(UnsupportedModelError, match="BailingMoEAttention"):
        check_model(model_with(RadixAttention(), "BailingMoEAttention", module="bailing_moe_linear"))


@pytest.mark.parametrize("name", ["DeepseekV3ForCausalLM", "SomethingForCausalLM"])
def test_a_model_that_nobody_tried_is_named(name: str, caplog: pytest.LogCaptureFixture) -> None:
    model = model_with(RadixAttention(), "DeepseekV2AttentionMLA")
    model.__class__ = type(name, (torch.nn.Module,), {})
    check_model(model)
    assert ("SomethingForCausalLM was not tried" in caplog.text) == (name not in TRIED_MODELS)


ROW = re.compile(r"^\| `(\w+)` \| ([^|]+) \| ([^|]+) \|$", re.MULTILINE)


def test_the_documented_list_is_the_list() -> None:
    """docs/extending.md: class, models tried, and for the refused ones the reason."""
    text = (Path(__file__).resolve().parents[3] / "docs" / "extending.md").read_text()
    rows = {name: (models, served.strip()) for name, models, served in ROW.findall(text.partition("## A model")[2].partition("\n## ")[0])}
    assert {name for name, (_, served) in rows.items() if served == "yes"} == set(SERVED_CLASSES)
    tried = {model for models, served in rows.values() if served == "yes" for model in re.findall(r"`(\w+)`", models)}
    assert tried == set(TRIED_MODELS)
    assert len(rows) > len(SERVED_CLASSES), "the classes that were tried and do not fit are named too"


def test_layers_are_named_by_id_whatever_forms_they_have() -> None:
    """MLA's layer has an absorbed and an expanded form under one id."""
    model = model_with(RadixAttention(layer_id=0))
    model.layers[0].self_attn.attn_mha = RadixAttention(layer_id=0)
    model.layers.append(model_with(RadixAttention(layer_id=3)).layers[0])
    assert attention_layers(model) == {0: "layers.0.self_attn", 3: "layers.1.self_attn"}


def test_layers_with_a_state_are_refused() -> None:
    mamba = type("MambaMixer2", (torch.nn.Module,), {})()
    assert "MambaMixer2" in str(find_unsupported_layer(model_with(mamba)))


def test_model_without_attention_is_refused() -> None:
    assert "no RadixAttention" in str(find_unsupported_layer(torch.nn.Linear(2, 2)))
