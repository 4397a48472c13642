"""Each model that is served, of SGLang's own classes in tiny: the attention of every layer equals the merge of two halves of the pool.

And those that are refused still have what they are refused for. A test that fails for one of these is good news: it can be served.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from upstream.model_cases import CASES, ModelCase

from sglang_dcp.cpu.environment import count_cuda_devices, cpu_additions
from sglang_dcp.upstream.attach.models import SERVED_CLASSES, SINK_CLASSES, TRIED_MODELS

pytestmark = pytest.mark.own_process

PROBE = Path(__file__).parent / "model_probe.py"
ALIASES = {"BailingMoEForCausalLM", "BailingMoeForCausalLM", "DeepseekV2ForCausalLM"}
"""Models whose code is that of a case (bailing_moe.py), or that are served for real by other tests (DeepSeek-V2)."""
TOLERANCE = {"torch.float32": 2e-6, "torch.bfloat16": 8e-3, "torch.float16": 1e-3}
"""Of values below 1. The merge adds in float32 and rounds once more than attention over the whole does."""
PROMPT_TOKENS, DECODE_STEPS = 23, 3

by_architecture = pytest.mark.parametrize("case", CASES, ids=lambda case: case.architecture)


@pytest.fixture(scope="module")
def probe() -> dict[str, dict[str, Any]]:
    """Outcomes by architecture, from a process with the environment of `sglang-dcp serve`."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SGLANG_")}
    environment = clean | cpu_additions(1, clean, has_cuda_driver=count_cuda_devices() is not None)
    result = subprocess.run([sys.executable, str(PROBE)], env=environment, capture_output=True, text=True, timeout=280, check=False)
    lines = [json.loads(line.removeprefix("PROBE ")) for line in result.stdout.splitlines() if line.startswith("PROBE ")]
    assert lines, f"the probe did not finish:\n{result.stderr[-2000:]}"
    return {line["architecture"]: line for line in lines}


@by_architecture
def test_two_halves_make_the_whole(probe: dict[str, dict[str, Any]], case: ModelCase) -> None:
    found = probe[case.architecture]
    assert "failed" not in found, found["failed"]
    assert found["owners"] == [case.attention]
    assert found["complaints"] == []
    assert found["sinks"] == ([[case.config()["num_attention_heads"]]] if case.attention in SINK_CLASSES else [])
    steps = [PROMPT_TOKENS] + [1] * DECODE_STEPS
    assert found["calls"] == [[layer, tokens] for tokens in steps for layer in found["layers"]], "every layer, once in every step"
    assert found["pool_error"] == 0.0, "the pool holds what the layer handed over"
    assert found["error"] <= TOLERANCE[found["dtype"]]
    assert found["half_alone"] > 0.05, "a half of the keys alone would be told"


@by_architecture
def test_served_are_those_that_run_under_data_parallel_attention(probe: dict[str, dict[str, Any]], case: ModelCase) -> None:
    found = probe[case.architecture]
    assert "failed" not in found, found["failed"]
    keeps_heads = found["heads_with_two_instances"] == [case.config()["num_attention_heads"]]
    # An idle instance that passes its attention by would leave the homes of its guests waiting.
    assert (keeps_heads and found["gathers_tokens"] and not found["skips_idle"]) == (case.attention in SERVED_CLASSES)
    if case.attention in SERVED_CLASSES:
        assert found["unsupported"] is None
    else:
        assert f"({case.attention}): not tested" in found["unsupported"]


def test_every_model_on_the_list_is_a_case() -> None:
    tried = {case.architecture for case in CASES if case.attention in SERVED_CLASSES}
    assert tried == set(TRIED_MODELS) - ALIASES
    assert {case.attention for case in CASES} >= set(SERVED_CLASSES)
