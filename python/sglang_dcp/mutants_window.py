"""Faults of window layers and sinks, for mutants.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang_dcp.dataflow import attention_step, step_plan


def _window_forgotten() -> None:
    """Shards of a window layer are asked for, and attend, all keys before a query."""
    rows, count = step_plan.pool_rows, step_plan.queries_that_see

    def pool_rows(*args: Any) -> Any:
        return rows(*args[:5])

    def queries_that_see(*args: Any) -> int:
        return count(*args[:4], None)

    for function in (pool_rows, queries_that_see):
        setattr(step_plan, function.__name__, function)


def _sink_counted_twice() -> None:
    """A sink takes its share once more, as if a shard had added it too."""
    original = attention_step.add_sinks

    def add_sinks(*args: Any) -> None:
        original(*args)
        original(*args)

    attention_step.add_sinks = add_sinks


WINDOW_MUTANTS: dict[str, Callable[[], None]] = {"window-forgotten": _window_forgotten, "sink-counted-twice": _sink_counted_twice}
