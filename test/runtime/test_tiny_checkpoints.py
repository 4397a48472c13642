"""GLM-4.5, GLM-4.7-Flash, Step-3.5 and gpt-oss in tiny, served on two instances: each token's log-probability is that of stock on one rank
with one pool.

Weights are random, so tokens are given and scored; a greedy path of such a model hangs on ties.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from upstream.checkpoints import checkpoint_server, with_sinks

from sglang_dcp.cpu.environment import count_cuda_devices, cpu_additions
from testing.client import Answer
from testing.recall import random_ids
from testing.server import Server, ServerConfig
from testing.transformers_reference import load_checkpoint, score

SERVED = {"Glm4MoeForCausalLM": False, "Glm4MoeLiteForCausalLM": True, "Step3p5ForCausalLM": False, "GptOssForCausalLM": False}
"""GQA, MLA, layers of a window of 128 tokens with more heads than the others have, and such layers with sinks; whether two tokenizer
workers stand in front, as test_tokenizer_workers.py has them."""
PROBE = Path(__file__).resolve().parents[1] / "upstream" / "score_probe.py"
PROMPTS = [(1500, {}), (640, {"degree": 2, "home": 0}), (333, {"degree": 2, "home": 1})]
"""Lengths and pins. The first is beyond one pool of 1,024 tokens."""
NEW_TOKENS = 16
SCORED = 150
"""Tokens at the end of prompt and answer that are compared, the answer's among them."""
CLOSE = 1e-4


@dataclass
class Case:
    """One model: what its server said, and what one large pool says of the same tokens."""

    answers: list[Answer]
    expected: list[list[float]]


def ask_about(server: Server) -> list[Answer]:
    answers = []
    for length, pin in PROMPTS:
        sampling = {"ignore_eos": True} | ({"custom_params": {"dyncp": pin}} if pin else {})
        prompt = random_ids(length, seed=length)
        answers.append(server.client.generate(prompt, max_new_tokens=NEW_TOKENS, logprobs=True, sampling=sampling))
    return answers


def score_in_one_pool(answers: dict[str, list[Answer]]) -> dict[str, list[list[float]]]:
    """By folder: log-probabilities of the last SCORED tokens of each prompt with its answer."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SGLANG_")}
    clean["PYTHONPATH"] = with_sinks(clean.get("PYTHONPATH", ""))
    environment = clean | cpu_additions(1, clean, has_cuda_driver=count_cuda_devices() is not None)
    prompts = [random_ids(length, seed=length) for length, _ in PROMPTS]
    asked = [
        [folder, [[prompt + list(answer.ids), SCORED] for prompt, answer in zip(prompts, given, strict=True)]]
        for folder, given in answers.items()
    ]
    command = [sys.executable, str(PROBE)]
    result = subprocess.run(command, env=environment, input=json.dumps(asked), capture_output=True, text=True, timeout=400, check=False)
    found = {}
    for line in result.stdout.splitlines():
        if line.startswith("PROBE "):
            told = json.loads(line.removeprefix("PROBE "))
            assert "failed" not in told, told["failed"]
            found[told["folder"]] = told["scores"]
    assert set(found) == set(answers), result.stderr[-2000:]
    return found


@pytest.fixture(scope="module")
def cases(serve: Callable[[ServerConfig], Server], checkpoint: Callable[[str], Path]) -> dict[str, Case]:
    folders = {name: str(checkpoint(name)) for name in SERVED}
    answers = {folders[name]: ask_about(serve(checkpoint_server(checkpoint(name), workers=workers))) for name, workers in SERVED.items()}
    expected = score_in_one_pool(answers)
    return {name: Case(answers[folder], expected[folder]) for name, folder in folders.items()}


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("architecture", SERVED)
def test_equal_to_one_large_pool(cases: dict[str, Case], architecture: str) -> None:
    case = cases[architecture]
    for answer, expected in zip(case.answers, case.expected, strict=True):
        assert len(answer.meta["dyncp"]["shards"]) == 2
        served = [token.logprob for token in (*answer.prompt_tokens, *answer.output_tokens)][-SCORED:]
        assert max(abs(a - b) for a, b in zip(served, expected, strict=True)) < CLOSE
    spread = [value for expected in case.expected for value in expected]
    assert max(spread) - min(spread) > 1, "weights that tell tokens apart"


def test_one_large_pool_of_gpt_oss_is_transformers(cases: dict[str, Case], checkpoint: Callable[[str], Path]) -> None:
    """So that what two instances equal is the model: its attention in that pool is a plugin of ours, its experts a stand-in."""
    model, case = load_checkpoint(checkpoint("GptOssForCausalLM")), cases["GptOssForCausalLM"]
    for (length, _), answer, expected in zip(PROMPTS[1:], case.answers[1:], case.expected[1:], strict=True):
        scores = score(model, random_ids(length, seed=length) + list(answer.ids))[-SCORED:]
        assert max(abs(a - b) for a, b in zip(scores, expected, strict=True)) < 1e-4
