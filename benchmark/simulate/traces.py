"""A user's own trace as a workload: any format of sglang_dcp.traces, its clock stretched to the asked rate."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmark.simulate.workloads import Workload, stretched
from sglang_dcp.traces.reader import DETECT, read_trace
from sglang_dcp.traces.records import Trace


def load_trace(path: Path, format_name: str = DETECT, *, strict: bool = False) -> tuple[Trace, Workload]:
    """The trace and its workload. Raises as `read_trace`, and ValueError for a trace without a clock."""
    trace = read_trace(path, format_name, strict=strict, least=2)
    return trace, trace_workload(path, trace)


def trace_workload(path: Path, trace: Trace) -> Workload:
    """Requests that share a tick are spread over it, as in the built-in `mooncake`. Raises ValueError when all arrive at once."""
    if not trace.span_s:
        raise ValueError(f"{path}: all requests arrive at one time; the trace has no clock")
    table = np.array([request[:3] for request in trace.requests], dtype=float)
    return stretched(trace.name, table[:, 0], table[:, 1].astype(np.int64), table[:, 2].astype(np.int64), jitter_s=trace.tick_s)
