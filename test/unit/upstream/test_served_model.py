"""What the main process reads off the served model, hands down and says."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest

from benchmark.multi_gpu.model_shapes import SHAPES
from sglang_dcp.config import CONFIG_VARIABLE, ConfigError, DynCpConfig
from sglang_dcp.upstream.attach import model_sizes as served_model
from sglang_dcp.upstream.router.placement_request import cost_model_of


@pytest.fixture
def server_args(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Arguments of a server of four layers of Qwen3-235B."""
    config = SimpleNamespace(**SHAPES["qwen3-235b-a22b"], num_hidden_layers=4)
    found = SimpleNamespace(_dyncp=DynCpConfig(), kv_cache_dtype="auto")
    monkeypatch.setenv(CONFIG_VARIABLE, found._dyncp.to_json())
    path = "sglang.srt.arg_groups.model_override_base.model_config_of"
    model = SimpleNamespace(hf_config=config, hf_text_config=config, num_attention_layers=config.num_hidden_layers)
    monkeypatch.setattr(path, lambda args: model)
    return found


def test_children_get_the_served_model(server_args: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(served_model, "card_name", lambda device: "NVIDIA H200")
    with caplog.at_level("INFO"):
        served_model.learn_served_model(server_args, "cuda")
    config = DynCpConfig.from_environment(os.environ)
    assert config == server_args._dyncp and config is not None and config.served_model is not None
    assert cost_model_of(config, 2).num_layers == 4 and cost_model_of(config.resolve(2), 2).name == "qwen3-235b-a22b.h200"
    assert "cost model qwen3-235b-a22b.h200, 94 layers there, 4 here" in caplog.text
    assert "is of 94 layers, the served model has 4: taken per layer; set your own with --dyncp-cost-model" in caplog.text
    caplog.clear()
    served_model.learn_served_model(server_args, "cuda")
    assert not caplog.records, "said once"


def test_a_cpu_server_is_placed_by_the_tiny_constants(server_args: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        served_model.learn_served_model(server_args, "cpu")
    assert "cost model cpu, 4 layers there, 4 here" in caplog.text and not [r for r in caplog.records if r.levelname == "WARNING"]
    assert cost_model_of(server_args._dyncp, 4).name == cost_model_of(DynCpConfig(), 4).name == "tiny.cpu"


def test_a_layer_that_attends_twice_counts_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """LongCat, which besides has a name of its own for experts per token."""
    shape = {name: value for name, value in SHAPES["deepseek-v3"].items() if name != "num_experts_per_tok"}
    config = SimpleNamespace(**shape, num_hidden_layers=28, moe_topk=12)
    model = SimpleNamespace(hf_config=config, hf_text_config=config, num_attention_layers=56)
    found: Any = SimpleNamespace(_dyncp=DynCpConfig(), kv_cache_dtype="auto")
    monkeypatch.setenv(CONFIG_VARIABLE, found._dyncp.to_json())
    monkeypatch.setattr("sglang.srt.arg_groups.model_override_base.model_config_of", lambda args: model)
    served_model.learn_served_model(found, "cpu")
    assert (found._dyncp.served_model.num_layers, found._dyncp.served_model.experts_per_token) == (56, 12)


def test_a_model_of_unknown_sizes_is_no_error_here(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    found: Any = SimpleNamespace(_dyncp=DynCpConfig(), kv_cache_dtype="auto")
    path = "sglang.srt.arg_groups.model_override_base.model_config_of"
    config = SimpleNamespace(num_hidden_layers=3)
    monkeypatch.setattr(path, lambda args: SimpleNamespace(hf_config=config, hf_text_config=config))
    served_model.learn_served_model(found, "cuda")
    assert found._dyncp.served_model is None and "sizes are not known" in caplog.text


def test_constants_that_ship_are_given_by_name() -> None:
    assert DynCpConfig(cost_model="deepseek-v3.h200").cost_model == "deepseek-v3.h200"
    with pytest.raises(ConfigError, match=r"--dyncp-cost-model 'deepseek-v9' is not a file.*deepseek-v3\.h200"):
        DynCpConfig(cost_model="deepseek-v9")


@pytest.mark.parametrize(
    ("setting", "checkpoint", "element_bytes"),
    [
        ("auto", None, 2),
        ("auto", {"kv_cache_quant_algo": "fp8"}, 1),
        ("fp8_e4m3", None, 1),
        ("bfloat16", {"kv_cache_quant_algo": "FP8"}, 2),
    ],
)
def test_bytes_of_an_element_of_the_pool(setting: str, checkpoint: dict[str, Any] | None, element_bytes: int) -> None:
    config = SimpleNamespace(quantization_config=checkpoint) if checkpoint else SimpleNamespace()
    assert served_model.kv_element_bytes(setting, config) == element_bytes
