"""Checkpoints of tiny models with random weights, most written by transformers: a server loads them as it loads any other.

Which weights they have says nothing about answers: tests of such a server compare scores, or two answers of it.
"""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path
from typing import Any

from upstream.model_cases import CASES, ModelCase, has_sinks

from testing.gpu.random_models import write_model
from testing.server import ServerConfig

TOKENIZER = Path(__file__).resolve().parents[2] / "testing" / "models" / "qwen3moe"
SEED = 20261128
KEY_SCALE = 2.0
"""Of query and key projections: attention over random keys is flat without it, and a lost shard would hardly show."""

OURS = {"Step3p5ForCausalLM": "step", "GptOssForCausalLM": "oss"}
"""By the name in testing/gpu/random_models.py: of the one transformers has no model, of the other random sinks are to weigh something."""
SINKS_ON_CPU = Path(__file__).resolve().parents[2] / "testing" / "gpu" / "sinks_on_cpu"
"""The plugin with which SGLang serves gpt-oss on any CPU."""

WORKER_FLAGS = ("--tokenizer-worker-num", "2", "--enable-http-worker-reuseport")
"""Two tokenizer workers with a listener each, whom the kernel deals connections to; else an idle server gives them to one alone."""


def checkpoint_server(folder: Path, *, workers: bool = False) -> ServerConfig:
    """Two instances of 1,024 tokens. workers: two tokenizer workers in front of them."""
    environment = [("SGLANG_DYNCP_CHECK_EVERY_STEP", "1")]
    if workers:
        # uvicorn ends a worker that does not answer within 10 s, and on a busy machine it imports for longer. It closes a connection that
        # is silent for 5 s, and a worker is known by its connection.
        environment += [("SGLANG_UVICORN_WORKER_HEALTHCHECK_TIMEOUT", "300"), ("SGLANG_TIMEOUT_KEEP_ALIVE", "600")]
    if has_sinks(folder):
        environment.append(("PYTHONPATH", with_sinks(os.environ.get("PYTHONPATH", ""))))
    flags = ("--model-path", str(folder), *(WORKER_FLAGS if workers else ()))
    flags += ("--trust-remote-code",) if list(folder.glob("configuration_*.py")) else ()
    return ServerConfig("qwen3moe", 2, pool_tokens=1024, chunk_tokens=256, dyncp=True, flags=flags, environment=tuple(environment))


def with_sinks(python_path: str) -> str:
    """A PYTHONPATH with the plugin on it."""
    return os.pathsep.join(filter(None, (python_path, str(SINKS_ON_CPU))))


def find_case(architecture: str) -> ModelCase:
    return next(case for case in CASES if case.architecture == architecture)


def write_checkpoint(case: ModelCase, folder: Path) -> Path:
    """Weights, configuration and tokenizer, in this folder or in one there. The same arguments give the same weights."""
    if case.architecture in OURS:
        return write_model(OURS[case.architecture], folder)
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = {name: value for name, value in case.config().items() if name != "architectures"}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields)).float()
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.copy_(_random_weight(name, weight, generator))
    model.save_pretrained(folder)
    for part in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / part, folder / part)
    return folder


def _random_weight(name: str, weight: Any, generator: Any) -> Any:
    """Of unit gain; embeddings of unit size, so that logits are a few nats apart."""
    import torch

    fan_in = weight.shape[-1]
    gain = KEY_SCALE if name.endswith(("q_proj.weight", "k_proj.weight", "lm_head.weight")) else 1.0
    if name.endswith("embed_tokens.weight"):
        gain = math.sqrt(fan_in)
    return torch.randn(weight.shape, generator=generator) * gain / math.sqrt(fan_in)
