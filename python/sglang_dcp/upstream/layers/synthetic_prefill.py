"""For benchmarks only: prompts are not computed. The pool holds seeded noise, and a step that prefills anywhere runs no layer anywhere.

A million tokens take an hour of prefill before the first step of decoding can be timed. With SGLANG_DYNCP_BENCHMARK=1 everything of a
prefill happens (placement, reservation, chunks, pages, messages) but the model's forward pass; what is decoded afterwards is real work on
noise. Answers mean nothing.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch

from sglang_dcp.upstream.step.attached import around
from sglang_dcp.upstream.step.runtime import Runtime

logger = logging.getLogger(__name__)

BENCHMARK_VARIABLE = "SGLANG_DYNCP_BENCHMARK"
SEED = 20_260_521


class BenchmarkModeError(ValueError):
    """The variable is set where it cannot work; the message names it."""


def is_enabled(environment: Mapping[str, str] = os.environ) -> bool:
    value = environment.get(BENCHMARK_VARIABLE)
    if value not in (None, "", "0", "1"):
        raise BenchmarkModeError(f"{BENCHMARK_VARIABLE}={value!r}: 1 skips prefills for benchmarks, unset or 0 serves")
    return value == "1"


def check_use(dyncp_enabled: bool, environment: Mapping[str, str] = os.environ) -> None:
    """Raises BenchmarkModeError where the variable would be ignored: a stock server would compute prompts all the same."""
    if is_enabled(environment) and not dyncp_enabled:
        raise BenchmarkModeError(f"{BENCHMARK_VARIABLE}=1 has no effect without --enable-dyncp; unset it")


def fill_pool(pool: Any, rank: int) -> None:
    """Noise of unit variance in every layer's K/V, the same for the same rank."""
    buffers = [*getattr(pool, "k_buffer", ()), *getattr(pool, "v_buffer", ()), *getattr(pool, "kv_buffer", ())]
    if not buffers:
        raise BenchmarkModeError(f"{BENCHMARK_VARIABLE}=1 does not know the KV pool {type(pool).__name__}")
    generator = torch.Generator(device=buffers[0].device).manual_seed(SEED + rank)
    for buffer in buffers:
        buffer.normal_(generator=generator)
    logger.warning("dyncp: %s=1: prefills are skipped, K/V are noise, answers mean nothing", BENCHMARK_VARIABLE)


@around
def skip_prefill(runtime: Runtime, original: Callable[..., Any], runner: Any, forward_batch: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND ModelRunner.forward: equal logits for every row of a step that prefills on some instance."""
    if not forward_batch.is_extend_in_batch:
        return original(runner, forward_batch, *args, **kwargs)
    runtime.layer_roll.excuse()
    from sglang.srt.layers.logits_processor import LogitsProcessorOutput
    from sglang.srt.model_executor.model_runner import ModelRunnerOutput

    rows = 0 if forward_batch.forward_mode.is_idle() else len(forward_batch.seq_lens)
    logits = torch.zeros(rows, runner.model_config.vocab_size, dtype=torch.float32, device=forward_batch.input_ids.device)
    return ModelRunnerOutput(LogitsProcessorOutput(next_token_logits=logits), can_run_graph=False)
