"""Writes docs/results/*.md from benchmark/results/*.json. With --check it only says which pages are out of date (exit code 1: some are)."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from scripts.result_pages import (
    clients,
    conversations,
    disaggregated,
    headline,
    kernels,
    memory,
    one_host,
    prices,
    several_gpus,
    simulation,
)

REPOSITORY = Path(__file__).resolve().parents[2]
FOLDER = REPOSITORY / "docs" / "results"

PAGES: dict[str, Callable[[], str]] = {
    "headline.md": headline.render,
    "one_host.md": one_host.render,
    "several_gpus.md": several_gpus.render,
    "kernels.md": kernels.render,
    "prices.md": prices.render,
    "simulation.md": simulation.render,
    "clients.md": clients.render,
    "memory.md": memory.render,
    "conversations.md": conversations.render,
    "disaggregated.md": disaggregated.render,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    stale = []
    for name, render in PAGES.items():
        path, text = FOLDER / name, render()
        if path.exists() and path.read_text() == text:
            continue
        stale.append(name)
        if not check:
            FOLDER.mkdir(exist_ok=True)
            path.write_text(text)
    if stale:
        print(f"docs/results: {'out of date: run `make results`' if check else 'wrote'} {', '.join(stale)}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
