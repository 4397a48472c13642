"""Documentation for a reader in a hurry: few numbers in a paragraph, few words in all, and every path that a page names exists."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
DOCS = REPOSITORY / "docs"
GENERATED = {"upstream_hooks.md", "upstream_contributions.md"}
WRITTEN = sorted(path for path in DOCS.glob("*.md") if path.name not in GENERATED)
FOLDERS = ("monitoring", "kubernetes", "reference")
BELOW = sorted(path for folder in FOLDERS for path in (DOCS / folder).rglob("*.md"))
GUIDES = [path for path in WRITTEN if path.name != "log.md"] + BELOW + [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md"]
MOST_NUMBERS = 3
MOST_WORDS = 10_000

NUMBER = re.compile(r"(?<![\w.,-])\d+(?:[.,]\d+)*(?![\w-])")
VERSION = re.compile(r"\b\d+\.\d+\.\d+\b|arXiv \S+")
REPOSITORY_FOLDERS = ("python", "test", "testing", "docs", "scripts", "benchmark", "sgl-kernel-dcp")


def paragraphs(text: str) -> Iterator[str]:
    """Prose: no code, no tables, no headings; an item of a list is a paragraph of its own."""
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    for block in re.split(r"\n\s*\n|\n(?=\s*(?:[-*]|\d+\.) )", text):
        lines = [line for line in block.splitlines() if not line.startswith(("|", "#", "<!--"))]
        if prose := " ".join(lines).strip():
            yield prose


def count_numbers(paragraph: str) -> int:
    """Numbers that a reader has to take in: not those of code, links, versions or the marks of a list."""
    prose = re.sub(r"`[^`]*`", "", paragraph)
    prose = re.sub(r"\]\([^)]*\)", "]", prose)
    return len(NUMBER.findall(re.sub(r"^\s*\d+\. ", "", VERSION.sub("", prose))))


@pytest.mark.parametrize("path", GUIDES, ids=lambda path: path.relative_to(REPOSITORY).as_posix())
def test_a_paragraph_has_few_numbers(path: Path) -> None:
    crowded = [(count_numbers(p), p[:90]) for p in paragraphs(path.read_text()) if count_numbers(p) > MOST_NUMBERS]
    assert crowded == []


def test_the_counter_counts() -> None:
    assert count_numbers("between 1.5 and 2,000 of 7 %, `--tp 8` on SGLang 0.5.23 ([a page](x_12.md)), H100") == 3
    assert count_numbers("1. first of 2") == 1
    assert [*paragraphs("# Head 1\n\none\n- two\n  three\n\n| 1 | 2 |\n\n```\n4\n```\n")] == ["one", "- two   three"]


def test_written_pages_are_short() -> None:
    words = {path.name: len(path.read_text().split()) for path in WRITTEN}
    assert sum(words.values()) <= MOST_WORDS, words


def named_paths() -> list[tuple[str, str]]:
    """(page, path) of everything in code spans or links that looks like a path of this repository."""
    found = set()
    for page in [*GUIDES, DOCS / "log.md"]:
        for span in re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)):
            path = span.split("::")[0].rstrip("/")
            if path.startswith(tuple(f"{folder}/" for folder in REPOSITORY_FOLDERS)) and not re.search(r"[\s{}<>*]", path):
                found.add((page.name, path))
    return sorted(found)


@pytest.mark.parametrize(("page", "path"), named_paths())
def test_a_named_path_exists(page: str, path: str) -> None:
    assert (REPOSITORY / path).exists(), f"{page} names {path}, which is not there"


def test_paths_are_found() -> None:
    assert len(named_paths()) > 10


def test_the_log_names_what_ran_on_a_gpu() -> None:
    pages = "".join(path.read_text() for path in (DOCS / "results").glob("*.md"))
    commits = set(re.findall(r"H[12]00[^\n]*?, at ([0-9a-f]{7})", pages))
    assert len(commits) > 5
    assert {commit for commit in commits if commit not in (DOCS / "log.md").read_text()} == set()


def test_result_pages_are_up_to_date() -> None:
    command = [sys.executable, "scripts/results_tables.py", "--check"]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
