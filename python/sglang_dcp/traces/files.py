"""Rows of a trace file: CSV, JSON lines, a JSON array or Parquet, gzipped or not, with or without a byte order mark.

A line that is broken becomes an `Unreadable`, in its place: one bad line does not hide the others.
"""

from __future__ import annotations

import csv
import gzip
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from sglang_dcp.traces.records import Record, SkippedRow

Rows = Iterator[Record | SkippedRow]
LARGEST_FIELD = 1 << 24


def read_rows(path: Path) -> tuple[list[str], Rows]:
    """(names of a table's columns, rows); a file of JSON has no columns of its own. Rows of one file, in its order.

    Raises FileNotFoundError, ValueError for an empty file or one that is no text, and for a Parquet file without pyarrow.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--trace {path}: no such file")
    if path.name.endswith(".parquet"):
        return _parquet(path)
    file = _open(path)
    try:
        first = next((line for line in file if line.strip()), "").lstrip()
        file.seek(0)
        if not first:
            raise ValueError(f"{path}: the file is empty")
    except UnicodeDecodeError as error:
        file.close()
        raise ValueError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from error
    except (OSError, EOFError, ValueError):
        file.close()
        raise
    if first.startswith("["):
        return [], _json_array(path, file)
    if first.startswith("{"):
        return [], _json_lines(file)
    names, rows = _csv(path, file)
    return names, rows


def _open(path: Path) -> TextIO:
    """`utf-8-sig` drops a byte order mark; a gzip file is known by its first bytes, whatever its name."""
    with path.open("rb") as file:
        is_gzip = file.read(2) == b"\x1f\x8b"
    return gzip.open(path, "rt", encoding="utf-8-sig", newline="") if is_gzip else path.open(encoding="utf-8-sig", newline="")


def _csv(path: Path, file: TextIO) -> tuple[list[str], Rows]:
    # A published trace may carry whole prompts in a column that nobody reads.
    csv.field_size_limit(LARGEST_FIELD)
    lines = csv.reader(file, skipinitialspace=True)
    names = [name.strip() for name in next(row for row in lines if any(cell.strip() for cell in row))]
    return names, _csv_rows(path, file, lines, names)


def _csv_rows(path: Path, file: TextIO, lines: Any, names: list[str]) -> Rows:
    with file:
        while True:
            try:
                cells = next(lines, None)
            except csv.Error as error:
                yield SkippedRow(f"line {lines.line_num}", f"not CSV: {error}")
                continue
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}, line {lines.line_num + 1}: not UTF-8 text: {error.reason}") from error
            if cells is None:
                return
            where = f"line {lines.line_num}"
            if not any(cell.strip() for cell in cells):
                continue
            if len(cells) != len(names):
                yield SkippedRow(where, f"{len(cells)} values for {len(names)} columns")
            else:
                yield Record(where, dict(zip(names, cells, strict=True)))


def _json_lines(file: TextIO) -> Rows:
    with file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _json_row(f"line {number}", line)


def _json_row(where: str, line: str) -> Record | SkippedRow:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return SkippedRow(where, "not JSON")
    return Record(where, value) if isinstance(value, dict) else SkippedRow(where, "not a JSON object")


def _json_array(path: Path, file: TextIO) -> Rows:
    with file:
        try:
            values = json.load(file)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: not a JSON array: {error}") from error
    for number, value in enumerate(values, start=1):
        where = f"entry {number}"
        yield Record(where, value) if isinstance(value, dict) else SkippedRow(where, "not a JSON object")


def _parquet(path: Path) -> tuple[list[str], Rows]:
    try:
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise ValueError(f"{path}: reading Parquet needs pyarrow (pip install pyarrow)") from error
    table = pyarrow.parquet.read_table(path)
    names = list(table.schema.names)
    columns = [table.column(index).to_pylist() for index in range(len(names))]
    rows = zip(*columns, strict=True)
    return names, (Record(f"row {number}", dict(zip(names, row, strict=True))) for number, row in enumerate(rows, start=1))


def repeated(names: Iterable[str]) -> list[str]:
    """Names that stand more than once in a header."""
    return sorted(name for name, count in Counter(names).items() if count > 1)


def peek(rows: Rows) -> tuple[Record | None, Rows]:
    """(the first row that could be read, all rows, it and those before it included)."""
    seen: list[Record | SkippedRow] = []
    for row in rows:
        seen.append(row)
        if isinstance(row, Record):
            return row, itertools.chain(seen, rows)
    return None, iter(seen)
