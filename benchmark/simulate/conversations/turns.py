"""Turns of recorded conversations, arriving at an asked rate."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sglang_dcp.conversations.turns import Turn

LONGEST_GAP_S = 900.0
"""A user who is away longer comes back after this: the trace has gaps of a night."""

UNKNOWN_SERVICE_S = 6.0
"""Of a turn without an API time; the median of the others."""


def read_conversations(path: Path, divide: int = 1) -> list[list[Turn]]:
    """Conversations of a trace in the form of weka_claude_code (a row per request with session, t_session_s, run_start, run_len), each
    from 0 s on. divide: lengths are divided by it, for small pools. Raises OSError, and ValueError naming a column that is missing."""
    from pyarrow import parquet

    table = parquet.read_table(path)
    needed = ("session", "t_session_s", "input_length", "output_length", "api_time_s", "run_start", "run_len")
    missing = [name for name in needed if name not in table.column_names]
    if missing:
        raise ValueError(f"{path}: no column {missing[0]!r}; conversations need {', '.join(needed)}")
    rows = sorted(table.select(needed).to_pylist(), key=lambda row: (row["session"], row["t_session_s"]))
    return [_conversation(list(group), divide) for _, group in itertools.groupby(rows, key=lambda row: row["session"])]


def _conversation(rows: Sequence[dict[str, Any]], divide: int) -> list[Turn]:
    turns: list[Turn] = []
    clock, before = 0.0, rows[0]["t_session_s"]
    for row in rows:
        clock += min(LONGEST_GAP_S, row["t_session_s"] - before)
        before = row["t_session_s"]
        runs = [np.arange(start, start + count) for start, count in zip(row["run_start"], row["run_len"], strict=True)]
        blocks = np.concatenate(runs or [np.empty(0, dtype=np.int64)])[divide - 1 :: divide].copy()
        prompt, output = -(-row["input_length"] // divide), -(-row["output_length"] // divide)
        turns.append(Turn(clock, row["session"], max(1, prompt), max(1, output), row["api_time_s"] or UNKNOWN_SERVICE_S, blocks))
    return turns


def arrivals(conversations: Sequence[Sequence[Turn]], rate: float, hours: float, seed: int) -> list[Turn]:
    """Turns in order of arrival: conversations drawn at random begin as a Poisson process that brings `rate` requests per second in the
    long run; what would come after `hours` is cut off. Each begins anew under a number of its own."""
    if rate <= 0 or hours <= 0:
        raise ValueError(f"rate {rate} requests/s for {hours} hours: both must be above 0")
    random = np.random.default_rng(seed)
    mean_turns = sum(map(len, conversations)) / len(conversations)
    end, clock, turns = hours * 3600, 0.0, []
    for number in itertools.count():
        clock += random.exponential(mean_turns / rate)
        if clock >= end:
            return sorted(turns, key=lambda turn: turn.arrival_s)
        turns += _shifted(conversations[random.integers(len(conversations))], clock, number, end)
    raise AssertionError("not reached")


def _shifted(turns: Iterable[Turn], clock: float, number: int, end: float) -> list[Turn]:
    return [
        Turn(clock + t.arrival_s, number, t.prompt_tokens, t.output_tokens, t.service_s, t.blocks)
        for t in turns
        if clock + t.arrival_s < end
    ]
