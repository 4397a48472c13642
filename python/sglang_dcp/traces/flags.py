"""Flags of the commands that read a trace."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sglang_dcp.traces.reader import DETECT, FORMAT_NAMES


def add_trace_flags(parser: argparse.ArgumentParser, source: Any) -> None:
    """`--trace` to `source` (the parser or a group of it), `--trace-format` and `--strict` to the parser."""
    known = "Mooncake JSONL, Azure or BurstGPT CSV, ServeGen requests, a bench_serving output file with details, a placement log"
    source.add_argument("--trace", type=Path, help=f"{known}, or a table with arrival (seconds), input, output (tokens); may be gzipped")
    parser.add_argument(
        "--trace-format", choices=(DETECT, *FORMAT_NAMES), default=DETECT, help="format of --trace (default: known by its fields)"
    )
    parser.add_argument("--strict", action="store_true", help="refuse a trace with a row that cannot be used (default: skip and name it)")
