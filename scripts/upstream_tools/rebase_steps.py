"""The steps of a rebase: what broke and how upstream changed it, and the edits that need no thought."""

from __future__ import annotations

import difflib
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .compare import Kind, Verdict
from .locate import locate
from .source_tree import SourceTree

PIN_FILE = "UPSTREAM_VERSION"
PROJECT_FILE = "pyproject.toml"
PIN = re.compile(r"sglang==[0-9][\w.]*")


@dataclass(frozen=True)
class Edit:
    """A mechanical change of one file of this repository."""

    path: str
    text: str


def broken(verdicts: Sequence[Verdict]) -> list[Verdict]:
    return [verdict for verdict in verdicts if verdict.kind is not Kind.SAME]


def upstream_diff(verdict: Verdict, old: SourceTree, new: SourceTree, context: int = 3) -> list[str]:
    """Unified diff of a target between two releases, for the screen. A target that is gone shows what is lost."""
    before, after = locate(old, verdict.target.path), locate(new, verdict.target.path)
    old_lines = before.text(old) if before else []
    new_lines = after.text(new) if after else []
    old_name = f"{old.name}: {before.path}:{before.lines[0]}" if before else f"{old.name}: not there"
    new_name = f"{new.name}: {after.path}:{after.lines[0]}" if after else f"{new.name}: not there"
    return list(difflib.unified_diff(old_lines, new_lines, old_name, new_name, lineterm="", n=context))


def report(verdicts: Sequence[Verdict], old: SourceTree, new: SourceTree, *, diff_lines: int) -> str:
    """Every target that is not the same, each with upstream's diff (at most `diff_lines` lines of it)."""
    parts = []
    order = list(Kind)
    for verdict in sorted(broken(verdicts), key=lambda v: (-order.index(v.kind), v.target.path)):
        parts.append(f"== {verdict.target.path}: {verdict.kind.value} [{verdict.target.origin}]")
        parts += [f"   {detail}" for detail in verdict.details]
        diff = upstream_diff(verdict, old, new)
        parts += [f"   {line}" for line in diff[:diff_lines]]
        if len(diff) > diff_lines:
            parts.append(f"   ... {len(diff) - diff_lines} more lines (--diff-lines)")
    return "\n".join(parts)


def pin_edits(repository: Path, version: str) -> list[Edit]:
    """UPSTREAM_VERSION and the dependency in pyproject.toml. Raises ValueError where the dependency is not pinned once."""
    project = (repository / PROJECT_FILE).read_text()
    if len(PIN.findall(project)) != 1:
        raise ValueError(f"{PROJECT_FILE}: expected one pin of the form sglang==X, found {PIN.findall(project)}")
    return [Edit(PIN_FILE, f"{version}\n"), Edit(PROJECT_FILE, PIN.sub(f"sglang=={version}", project))]


def write_edits(repository: Path, edits: Sequence[Edit]) -> None:
    for edit in edits:
        (repository / edit.path).write_text(edit.text)


def add_worktree(repository: Path, branch: str, folder: Path) -> None:
    """A new branch in a work tree of its own: the tree that somebody works in is left alone."""
    run(["git", "worktree", "add", "--quiet", "-b", branch, str(folder), "HEAD"], repository)


def commit(repository: Path, paths: Sequence[str], message: str) -> str:
    """Commits `paths` and returns the short hash; that of HEAD where nothing changed (a rebase onto the pin itself)."""
    run(["git", "add", "--", *paths], repository)
    if run(["git", "diff", "--cached", "--name-only", "--", *paths], repository):
        run(["git", "commit", "--quiet", "-m", message, "--", *paths], repository)
    return run(["git", "rev-parse", "--short", "HEAD"], repository).strip()


def run(command: Sequence[str], folder: Path) -> str:
    """Runs a command and returns its output. Raises RuntimeError with the end of its errors."""
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit code {result.returncode}\n{result.stderr.strip()[-1500:]}")
    return result.stdout


def failed_tests(output: str) -> list[str]:
    """Names in pytest's short summary."""
    return re.findall(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
