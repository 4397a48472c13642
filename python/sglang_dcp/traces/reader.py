"""Reads a trace file of any known format.

    read_trace(Path("conversation_trace.jsonl"))          # Trace: requests, what was skipped, what was assumed

The format is detected from the names of the first row's fields, or named. A row that cannot be used is counted and kept by place and
reason; `strict` refuses the file for it instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from statistics import median

from sglang_dcp.traces import bench_serving, placement_log
from sglang_dcp.traces.files import Rows, peek, read_rows, repeated
from sglang_dcp.traces.records import Record, RowError, SkippedRow, Trace, TraceRequest
from sglang_dcp.traces.row_formats import MOONCAKE, ROW_FORMATS, RowFormat, names_of

DETECT = "auto"
FORMAT_NAMES = (*(item.name for item in ROW_FORMATS), bench_serving.NAME, placement_log.NAME)
# Arrivals this far apart, several at each, are a clock of coarse ticks and not bursts.
SHORTEST_TICK_S = 1.0


def read_trace(path: Path, format_name: str = DETECT, *, strict: bool = False, least: int = 1) -> Trace:
    """The trace in `path`, arrivals from 0 s on.

    Raises FileNotFoundError; ValueError for a format that is unknown or does not fit, a column that is missing or stands twice, a file
    with fewer than `least` usable rows, and with `strict` for the first row that is not usable, by line and reason.
    """
    names, rows = read_rows(path)
    first, rows = peek(rows)
    known = names or (names_of(first.fields) if first else [])
    chosen = detect(path, known, is_table=bool(names)) if format_name == DETECT else format_name
    if chosen not in FORMAT_NAMES:
        raise ValueError(f"--trace-format {chosen!r}: expected one of {', '.join(FORMAT_NAMES)}")
    notes: list[str] = []
    by_name = {item.name: item for item in ROW_FORMATS}
    if chosen == bench_serving.NAME:
        found = _bench_serving_rows(rows, notes)
    elif chosen == placement_log.NAME:
        notes.append(placement_log.NOTE)
        found = _placement_rows(rows)
    else:
        found = _request_rows(by_name[chosen], _used_fields(path, by_name[chosen], names, known), rows)
    requests: list[TraceRequest] = []
    skipped: list[SkippedRow] = []
    for item in found:
        if isinstance(item, TraceRequest):
            requests.append(item)
            continue
        if strict:
            raise ValueError(f"{path}, {item.where}: {item.reason} (--strict)")
        skipped.append(item)
    if len(requests) < least:
        reasons = f"; {skipped[0].where}: {skipped[0].reason}" if skipped else ""
        raise ValueError(f"{path}: a trace needs at least {least} usable requests, this has {len(requests)} ({chosen}){reasons}")
    return _finish(path, chosen, requests, skipped, notes)


def detect(path: Path, fields: list[str], *, is_table: bool) -> str:
    """Name of the format with these fields; `is_table`: they are columns. Raises ValueError listing the formats.

    Three fields of Mooncake's names mean milliseconds in a file of JSON and, as ever, seconds in a table.
    """
    as_keys = dict.fromkeys(fields)
    if not is_table and placement_log.matches(as_keys):
        return placement_log.NAME
    if not is_table and bench_serving.matches(as_keys):
        return bench_serving.NAME
    if not is_table and {"timestamp", "input_length", "output_length"} <= set(fields):
        return MOONCAKE.name
    for item in ROW_FORMATS:
        if item.matches(fields):
            return item.name
    wanted = "arrival (seconds), input, output (tokens)"
    raise ValueError(
        f"{path}: no known trace has the fields {', '.join(fields[:12]) or '(none)'}; "
        f"known formats: {', '.join(FORMAT_NAMES)}; a table of your own needs {wanted}"
    )


def _used_fields(path: Path, chosen: RowFormat, names: list[str], known: list[str]) -> list[str]:
    try:
        used = chosen.used_fields(known)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    twice = [name for name in repeated(names) if name in used]
    if twice:
        raise ValueError(f"{path}: column {twice[0]!r} stands more than once in the header")
    return used


def _request_rows(chosen: RowFormat, names: list[str], rows: Rows) -> Iterator[TraceRequest | SkippedRow]:
    for row in rows:
        if isinstance(row, SkippedRow):
            yield row
            continue
        try:
            yield chosen.read(row.fields, names)
        except RowError as error:
            yield SkippedRow(row.where, str(error))


def _placement_rows(rows: Rows) -> Iterator[TraceRequest | SkippedRow]:
    for row in rows:
        try:
            found = row if isinstance(row, SkippedRow) else placement_log.read(row.fields)
            if found is not None:
                yield found
        except RowError as error:
            yield SkippedRow(row.where, str(error))


def _bench_serving_rows(rows: Rows, notes: list[str]) -> Iterator[TraceRequest | SkippedRow]:
    start_s = 0.0
    for row in rows:
        if not isinstance(row, Record):
            yield row
            continue
        try:
            start_s = yield from bench_serving.read(row, start_s)
            notes.append(bench_serving.note(row))
        except RowError as error:
            yield SkippedRow(row.where, str(error))


def _finish(path: Path, chosen: str, requests: list[TraceRequest], skipped: list[SkippedRow], notes: list[str]) -> Trace:
    requests.sort()
    first = requests[0].arrival_s
    shifted = tuple(item._replace(arrival_s=item.arrival_s - first) for item in requests)
    tick_s = _tick_s(shifted) if chosen == MOONCAKE.name else 0.0
    name = path.name.removesuffix(".gz").rsplit(".", 1)[0]
    block_tokens = MOONCAKE.block_tokens if any(item.blocks for item in shifted) else 0
    return Trace(name, chosen, shifted, tuple(skipped), tick_s, tuple(notes), block_tokens)


def _tick_s(requests: tuple[TraceRequest, ...]) -> float:
    """Length of a coarse clock's ticks, 0 for a clock that is fine enough."""
    moments = sorted({item.arrival_s for item in requests})
    gaps = [later - earlier for earlier, later in zip(moments, moments[1:], strict=False)]
    if len(moments) == len(requests) or not gaps or min(gaps) < SHORTEST_TICK_S:
        return 0.0
    return round(median(gaps), 1)
