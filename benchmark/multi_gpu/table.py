"""The printed table: one block per part, one line per row of its figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def format_report(report: Mapping[str, Any]) -> str:
    blocks = [f"{report['num_gpus']} instances, {report['machine']}, commit {report['commit']}"]
    for letter, section in report["parts"].items():
        reason = f" - {section['reason']}" if section["reason"] else ""
        blocks.append(f"\n({letter}) {section['title']}: {section['status']}{reason}")
        blocks += format_rows(section["figures"]["rows"])
        blocks += [f"  {key}: {value}" for key, value in section["figures"].get("notes", {}).items()]
    return "\n".join(blocks)


def format_rows(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Aligned lines. Rows of different columns get a heading each time the columns change."""
    lines: list[str] = []
    at = 0
    while at < len(rows):
        columns = list(rows[at])
        end = at
        while end < len(rows) and list(rows[end]) == columns:
            end += 1
        cells = [[format_cell(row[column]) for column in columns] for row in rows[at:end]]
        widths = [max(len(column), *(len(line[i]) for line in cells)) for i, column in enumerate(columns)]
        lines += ["  " + "  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)) for line in [columns, *cells]]
        at = end
    return lines


def format_cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)
