"""A user's own trace: CSV or Parquet with arrival (seconds), input and output (tokens)."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmark.simulate.workloads import Workload, stretched

NAMES = {
    "arrival": ("arrival", "arrival_s", "timestamp_s", "timestamp", "timestamp_ms"),
    "input": ("input", "input_length", "prompt_len", "prompt_tokens"),
    "output": ("output", "output_length", "output_len", "output_tokens"),
}


def read_trace(path: Path) -> Workload:
    """A workload from a file. Raises ValueError naming file, line and value of a bad row, or the column that is missing.

    Column names: arrival (or arrival_s, timestamp_s, timestamp; timestamp_ms in milliseconds), input (input_length, ...), output.
    Rows may be in any order. Lines count from 1; in CSV the header is line 1, in Parquet the first row is row 1.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--trace {path}: no such file")
    rows = [_parse(path, where, values) for where, values in _rows(path)]
    if len(rows) < 2:
        raise ValueError(f"{path}: a trace needs at least two requests, got {len(rows)}")
    table = np.array(sorted(rows), dtype=float)
    if table[-1, 0] <= table[0, 0]:
        raise ValueError(f"{path}: all requests arrive at {table[0, 0]}; the trace has no clock")
    return stretched(path.stem, table[:, 0], table[:, 1].astype(np.int64), table[:, 2].astype(np.int64))


def _rows(path: Path) -> Iterator[tuple[str, list[Any]]]:
    if path.suffix == ".parquet":
        import pyarrow.parquet

        table = pyarrow.parquet.read_table(path)
        columns, milliseconds = _select(path, table.schema.names)
        data = [table[column].to_pylist() for column in columns]
        for number, values in enumerate(zip(*data, strict=True), start=1):
            yield f"row {number}", _scaled(list(values), milliseconds)
        return
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        columns, milliseconds = _select(path, list(reader.fieldnames or []))
        for row in reader:
            yield f"line {reader.line_num}", _scaled([row[column] for column in columns], milliseconds)


def _select(path: Path, names: list[str]) -> tuple[list[str], bool]:
    chosen = []
    for wanted, spellings in NAMES.items():
        found = [name for name in spellings if name in names]
        if not found:
            raise ValueError(f"{path}: no column for {wanted}; expected one of {', '.join(spellings)}, got {names}")
        chosen.append(found[0])
    return chosen, chosen[0] == "timestamp_ms"


def _scaled(values: list[Any], milliseconds: bool) -> list[Any]:
    return [*values, 1e-3 if milliseconds else 1.0]


def _parse(path: Path, where: str, values: list[Any]) -> tuple[float, int, int]:
    arrival, prompt, output, scale = values
    try:
        row = float(arrival) * scale, int(prompt), int(output)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}, {where}: {error}") from error
    if not math.isfinite(row[0]) or row[0] < 0 or row[1] < 1 or row[2] < 1:
        raise ValueError(f"{path}, {where}: arrival must be >= 0, input and output >= 1, got {arrival}, {prompt}, {output}")
    return row
