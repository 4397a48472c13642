"""What is read from a profiler's trace, and how loads and ratios are made. No GPU needed."""

from __future__ import annotations

import math
from typing import Any

import pytest

from benchmark.gpu_runtime.loads import Load, ratio_interval
from benchmark.gpu_runtime.traces import compare_graphs, step_summary, waits_inside_replays


def runtime(name: str, ts: float, dur: float, correlation: int = 0, tid: int = 1) -> dict[str, Any]:
    return {"cat": "cuda_runtime", "name": name, "ts": ts, "dur": dur, "tid": tid, "args": {"correlation": correlation}}


def kernel(name: str, dur: float, correlation: int) -> dict[str, Any]:
    return {"cat": "kernel", "name": name, "ts": 0, "dur": dur, "args": {"correlation": correlation}}


EVENTS = [
    runtime("cudaGraphLaunch", 0, 10, 1),
    runtime("cudaGraphLaunch", 100, 10, 2),
    runtime("cudaLaunchKernel", 50, 2, 3),
    runtime("cudaEventSynchronize", 60, 5, 4),
    *[kernel("fused_moe_kernel", 30, launch) for launch in (1, 1, 2, 2)],
    *[kernel("void dcp::dispatch_kernel<false, 1>", 6, launch) for launch in (1, 2)],
    kernel("void flashinfer::BatchPrefillWithPagedKVCacheKernel", 20, 1),
    kernel("void flashinfer::BatchPrefillWithPagedKVCacheKernel", 22, 2),
    kernel("void dcp::step_tables_kernel", 5, 3),
]


def test_a_step_by_kinds() -> None:
    found = step_summary(EVENTS, steps=2)
    assert found["graph_launches"] == 1 and found["kernels"] == 4.5
    assert found["us"] == {"rest": 60.0, "ours": 8.5, "attention": 21.0}
    assert found["host_waits"] == {"cudaEventSynchronize": 0.5}


def test_kernels_of_a_replay_only() -> None:
    graph = step_summary(EVENTS, steps=2)["graph"]
    assert graph == {
        "fused_moe_kernel": 2.0,
        "void dcp::dispatch_kernel<false, 1>": 1.0,
        "void flashinfer::BatchPrefillWithPagedKVCacheKernel": 1.0,
    }
    assert compare_graphs(graph, graph) == {}
    assert compare_graphs({"moe": 2.0}, {"moe": 3.0, "other": 1.0}) == {"moe": [2.0, 3.0], "other": [0.0, 1.0]}


def test_a_wait_inside_a_replay_is_seen() -> None:
    assert waits_inside_replays(EVENTS) == 0
    assert waits_inside_replays([*EVENTS, runtime("cudaStreamSynchronize", 105, 1)]) == 1
    assert waits_inside_replays([*EVENTS, runtime("cudaStreamSynchronize", 105, 1, tid=2)]) == 0


def test_pairs_give_a_ratio_with_its_interval() -> None:
    found = ratio_interval([1.1, 2.2, 3.3], [1.0, 2.0, 3.0])
    assert found == {"ratio": 1.1, "low": 1.1, "high": 1.1}
    wide = ratio_interval([1.0, 1.2], [1.0, 1.0])
    assert wide["ratio"] == pytest.approx(math.sqrt(1.2), abs=1e-4)
    assert wide["low"] < 1.0 and wide["high"] > 1.2


def test_jobs_pin_ours_and_route_stock() -> None:
    load = Load(home_rows=3, sharded=1, prompt=5, new_tokens=2)
    ours, stock = load.jobs(2, 7, dyncp=True), load.jobs(2, 7, dyncp=False)
    assert [ids for ids, _, _ in ours] == [ids for ids, _, _ in stock] and len(ours) == 6
    assert [sampling["custom_params"]["dyncp"] for _, sampling, _ in ours[:2]] == [{"degree": 2, "home": 0}, {"degree": 1, "home": 0}]
    assert [fields for _, _, fields in stock] == [{"routed_dp_rank": 0}] * 3 + [{"routed_dp_rank": 1}] * 3
