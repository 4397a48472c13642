"""Scores token sequences with stock SGLang's own model on one rank with one large pool, the overlay's CPU hooks alone (and for gpt-oss the
plugin testing/gpu/sinks_on_cpu, which must be on PYTHONPATH).

Reads [[folder, [[tokens, number of last tokens to score], ...]], ...] as JSON from standard input and prints one JSON line per folder.
A process of its own with a fork per model, as model_probe.py.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from model_cases import has_sinks
from model_probe import load

POOL_TOKENS = 8192


def score(runner: Any, tokens: list[int], count: int) -> list[float]:
    """Log-probabilities of the last `count` tokens, each by a decode step that is told what came before."""
    from sglang.benchmark.one_batch import prepare_synthetic_inputs_for_latency_test

    start = len(tokens) - count
    requests = prepare_synthetic_inputs_for_latency_test(1, start, [tokens[:start]])
    _, logits, batch = runner.extend(requests)
    scores = []
    for token in tokens[start:]:
        scores.append(float(torch.log_softmax(logits[0].float(), dim=-1)[token]))
        _, logits = runner.decode(torch.tensor([token]), batch)
    runner.torch_runner.req_to_token_pool.clear()
    runner.torch_runner.token_to_kv_pool_allocator.clear()
    return scores


def load_stock(folder: str) -> Any:
    further = {}
    if has_sinks(Path(folder)):
        import sinks_on_cpu
        from sglang.srt.plugins.hook_registry import HookRegistry

        sinks_on_cpu.register()
        HookRegistry.apply_hooks()
        further = {"moe_runner_backend": "triton"}  # SGLang's choice on one rank lays weights out otherwise
    return load(folder, load_format="auto", pool_tokens=POOL_TOKENS, **further)


def main() -> None:
    import sglang.benchmark.one_batch  # noqa: F401 - the one import that all forks share

    from sglang_dcp.cpu.hooks import CPU_HOOKS
    from sglang_dcp.upstream.attach.install import install

    install(CPU_HOOKS)
    for folder, sequences in json.load(sys.stdin):
        child = os.fork()
        if child == 0:
            try:
                runner = load_stock(folder)
                outcome = {"scores": [score(runner, tokens, count) for tokens, count in sequences]}
            except BaseException:  # noqa: BLE001 - whatever it raises is the finding
                outcome = {"failed": traceback.format_exc()[-3000:]}
            print("PROBE " + json.dumps({"folder": folder} | outcome), flush=True)
            os._exit(0)
        os.waitpid(child, 0)


if __name__ == "__main__":
    main()
