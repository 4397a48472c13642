"""Reading a result file, and what every page is built of: a heading, where its figures come from, tables."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[2] / "benchmark" / "results"


def load(name: str) -> dict[str, Any]:
    """benchmark/results/NAME, parsed."""
    return json.loads((RESULTS / name).read_text())


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; None is an empty cell."""
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
    lines += ["| " + " | ".join("" if cell is None else str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def source(name: str, result: dict[str, Any]) -> str:
    """Where a table's figures come from: file, machine, commit and command."""
    machine = result.get("machine") or result.get("card", "")
    return f"[`{name}`](../../benchmark/results/{name}): {machine}, at {result['commit']}, `{result['command'].strip()}`"


def notes(texts: Iterable[str]) -> str:
    """What is to be known of a result, as a list."""
    return "\n".join(f"- {text}" for text in texts)


def page(title: str, *parts: str) -> str:
    """A generated page."""
    return "\n\n".join([f"# {title}", "Written by `make results`; edit `scripts/result_pages/`.", *parts]) + "\n"
