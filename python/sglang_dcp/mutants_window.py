"""Faults of window layers and sinks, for mutants.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sglang_dcp.dataflow import attention_step, step_plan
from sglang_dcp.dataflow.contracts import PartialState


def _window_forgotten() -> None:
    """Shards of a window layer are asked for, and attend, all keys before a query."""
    rows: Any = step_plan.pool_rows
    count: Any = step_plan.queries_that_see

    def pool_rows(*args: Any) -> Any:
        return rows(*args[:5])

    def queries_that_see(*args: Any) -> int:
        seen: int = count(*args[:4], None)
        return seen

    for function in (pool_rows, queries_that_see):
        setattr(step_plan, function.__name__, function)


def _sink_counted_twice() -> None:
    """A sink takes its share once more, as if a shard had added it too."""
    original = attention_step.add_sinks

    def add_sinks(state: PartialState, sinks: torch.Tensor) -> None:
        original(state, sinks)
        original(state, sinks)

    attention_step.add_sinks = add_sinks


WINDOW_MUTANTS: dict[str, Callable[[], None]] = {"window-forgotten": _window_forgotten, "sink-counted-twice": _sink_counted_twice}
