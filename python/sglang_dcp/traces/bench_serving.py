"""The output file of `sglang.bench_serving --output-details`: one JSON line per run, with lengths and no arrivals.

The times are not in the file, so a run's requests are given the gaps of a Poisson stream at the rate that it was sent at, or where that
was unlimited or unknown at the rate at which it completed. Runs of one file follow each other.
"""

from __future__ import annotations

import math
import random
from collections.abc import Generator, Mapping
from typing import Any

from sglang_dcp.traces.records import Record, RowError, SkippedRow, TraceRequest
from sglang_dcp.traces.values import length

NAME = "bench_serving"
MARKS = ("backend", "dataset_name", "request_rate", "duration", "completed")
NEEDED = ("input_lens", "output_lens")


def matches(fields: Mapping[str, Any]) -> bool:
    """Whether this is a line of such a file, with details or without."""
    return all(name in fields for name in MARKS)


def read(record: Record, start_s: float) -> Generator[TraceRequest | SkippedRow, None, float]:
    """Requests of one run, the first at `start_s`; returns when the next run may begin. Raises RowError for a line without details."""
    run = record.fields
    if not all(isinstance(run.get(name), list) for name in NEEDED):
        raise RowError("no lengths of single requests: run bench_serving with --output-details")
    prompts, outputs = run["input_lens"], run["output_lens"]
    errors = run.get("errors") or [""] * len(prompts)
    if not len(prompts) == len(outputs) == len(errors):
        raise RowError(f"{len(prompts)} input_lens, {len(outputs)} output_lens and {len(errors)} errors")
    rate, generator, clock = _rate(run, len(prompts)), random.Random(1), start_s
    for number, (prompt, output, error) in enumerate(zip(prompts, outputs, errors, strict=True), start=1):
        where = f"{record.where}, request {number}"
        try:
            if error:
                raise RowError("a failed request (it has an error)")
            yield TraceRequest(clock, length(prompt, "input_lens"), length(output, "output_lens"))
        except RowError as reason:
            yield SkippedRow(where, str(reason))
        clock += generator.expovariate(rate)
    return clock


def note(record: Record) -> str:
    """What was assumed about the arrivals of a run."""
    rate = _rate(record.fields, len(record.fields["input_lens"]))
    return f"{record.where}: the file has no arrival times; a Poisson stream of {rate:.3g} requests/s is taken"


def _rate(run: Mapping[str, Any], num_requests: int) -> float:
    """Raises RowError where the run tells neither its rate nor its duration."""
    for value in (run.get("request_rate"), _ratio(num_requests, run.get("duration"))):
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0:
            return float(value)
    raise RowError("neither request_rate nor duration is a positive number")


def _ratio(count: int, span: Any) -> float | None:
    return count / span if isinstance(span, int | float) and span > 0 else None
