"""Serve commands that the documentation shows, as they are written there."""

from __future__ import annotations

import re
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
LAUNCHERS = ("sglang-dcp serve", "sglang serve", "python -m sglang.launch_server")
FURTHER_FLAGS = re.compile(r"\s*\[[^\]]*\]\s*$")


def serve_lines(pages: list[str] | None = None) -> list[str]:
    """Every serve command of a code block, once, without comments and what it says may follow. `--help` starts no server.

    pages: texts in markdown; None is README.md and everything in docs/.
    """
    if pages is None:
        pages = [path.read_text() for path in (REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md")))]
    blocks = (block for page in pages for block in re.findall(r"```[a-z]*\n(.*?)```", page, re.DOTALL))
    lines = (line for block in blocks for line in re.sub(r"\\\n\s*", "", block).splitlines())
    shown = {FURTHER_FLAGS.sub("", line.split("#")[0]).strip() for line in lines}
    return sorted(line for line in shown if any(launcher in line for launcher in LAUNCHERS) and "--help" not in line)
