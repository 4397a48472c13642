"""Serve commands that the documentation shows, as they are written there."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

REPOSITORY = Path(__file__).resolve().parents[1]
LAUNCHERS = ("sglang-dcp serve", "sglang serve", "python -m sglang.launch_server")
MANIFEST = REPOSITORY / "docs" / "kubernetes" / "leaderworkerset.yaml"
LEADER = {"$(LWS_GROUP_SIZE)": "2", "$(LWS_WORKER_INDEX)": "0", "$(LWS_LEADER_ADDRESS)": "leader", "/models/MODEL": "MODEL"}
"""What LeaderWorkerSet fills in for the first of two pods."""
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


def manifest_line() -> str:
    """The serve command of the LeaderWorkerSet example, as its first pod runs it."""
    text = MANIFEST.read_text()
    for name, value in LEADER.items():
        text = text.replace(name, value)
    group, _service = yaml.safe_load_all(text)
    (container,) = group["spec"]["leaderWorkerTemplate"]["leaderTemplate"]["spec"]["containers"]
    return " ".join(["sglang-dcp serve", *(argument.replace("=", " ", 1) for argument in container["args"])])
