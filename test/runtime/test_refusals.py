"""What a server refuses at start, by name, through real processes. Every setting is tested in test/unit/upstream/test_settings.py."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from testing.recall import model_path
from testing.server import ServerConfig, ServerPool, ServerStartError

CONFIG = ServerConfig("qwen3moe", 2, pool_tokens=1024, page_size=16, chunk_tokens=256, dyncp=True)


def start_and_fail(pool: ServerPool, config: ServerConfig) -> str:
    """The end of the log of a server that must not come up."""
    pool.stop(at_once=True)
    with pytest.raises(ServerStartError) as failure:
        pool.start(config).stop()
    return str(failure.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--enable-mixed-chunk",), "--enable-mixed-chunk True does not work with --enable-dyncp: a batch is either a prefill or a decode"),
        (("--dyncp-max-degree", "0"), "--dyncp-max-degree must be at least 1, got 0"),
    ],
)
def test_settings_are_refused_by_name(pool: ServerPool, flags: tuple[str, ...], message: str) -> None:
    assert message in start_and_fail(pool, dataclasses.replace(CONFIG, flags=flags))


def test_model_outside_the_allow_list_is_refused_by_its_layer(pool: ServerPool, tmp_path: Path) -> None:
    """A Qwen3 without experts, random weights."""
    model = tmp_path / "dense"
    shutil.copytree(model_path("qwen3moe"), model, ignore=shutil.ignore_patterns("*.safetensors*", "*.bin"))
    settings = json.loads((model / "config.json").read_text())
    settings |= {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
    (model / "config.json").write_text(json.dumps(settings))
    config = dataclasses.replace(CONFIG, flags=("--model-path", str(model), "--load-format", "dummy"), preloaded=True)
    message = start_and_fail(pool, config)
    assert "does not serve this model: layer model.layers.0.self_attn" in message
    assert "(Qwen3Attention): not tested; served are Qwen2MoeAttention" in message
