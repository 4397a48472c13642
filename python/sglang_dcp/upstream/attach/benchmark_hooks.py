"""Touch points of measurements alone: installed in schedulers of a server that was started with SGLANG_DYNCP_BENCHMARK=1."""

from __future__ import annotations

from sglang_dcp.upstream.attach.hook import Hook

BENCHMARK_HOOKS: tuple[Hook, ...] = (
    Hook(
        target="sglang.srt.model_executor.model_runner.ModelRunner.forward",
        kind="around",
        hook_set="benchmark",
        handler="sglang_dcp.upstream.layers.synthetic_prefill:skip_prefill",
        why="benchmarks of long contexts do not wait for their prompts (SGLANG_DYNCP_BENCHMARK=1 only)",
        upstream="a dummy prefill for benchmarks",
        remove_when="SGLang can skip prefills",
        parameters=("forward_batch",),
    ),
)
