"""Runs the parts one after the other, each with its own time limit and its own section, and writes the JSON after every one."""

from __future__ import annotations

import http.client
import json
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from benchmark.multi_gpu.settings import PARTS, Settings, Skipped

FAILURES = (
    RuntimeError,
    OSError,
    AssertionError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    ImportError,
    EOFError,
    http.client.HTTPException,
    subprocess.SubprocessError,
)
STATUSES = ("done", "skipped", "failed")
Part = Callable[[Settings, dict[str, Any], Callable[[], None]], None]
"""(settings, figures to fill, save): figures hold "rows" (flat dictionaries, the table's lines) and whatever else is worth keeping."""


class PartTimeout(BaseException):
    """Raised in the main thread when a part's time is over. Not an Exception: nothing on the way may take it for a failed request."""


class Terminated(BaseException):
    """SIGTERM: the rest is left out, processes are stopped and what is there is written."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    def expire(_number: int, _frame: FrameType | None) -> None:
        raise PartTimeout

    previous = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, previous)


@contextmanager
def terminate_cleanly() -> Iterator[None]:
    def terminate(_number: int, _frame: FrameType | None) -> None:
        raise Terminated

    previous = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@dataclass
class Report:
    """The JSON as it grows. `head`: command, commit, machine."""

    head: dict[str, Any]
    path: Path
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)

    def save(self) -> None:
        """Replaces the file in one go, so that a reader (or a kill) never finds half of it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draft = self.path.with_suffix(".partial")
        draft.write_text(json.dumps(self.head | {"parts": self.sections}, indent=1) + "\n")
        draft.replace(self.path)

    def run(self, letters: Sequence[str], parts: Mapping[str, Part], settings: Settings) -> bool:
        """Runs the parts in order; True when none failed. A part reads earlier figures through `settings.out`."""
        with terminate_cleanly():
            for letter in letters:
                self._run_part(letter, parts[letter], settings)
                section = self.sections[letter]
                reason = f": {section['reason']}" if section["reason"] else ""
                print(f"part {letter} ({section['title']}) {section['status']} after {section['seconds']} s{reason}", flush=True)
        return all(section["status"] != "failed" for section in self.sections.values())

    def _run_part(self, letter: str, part: Part, settings: Settings) -> None:
        title, limit = PARTS[letter][0], settings.limit_s(letter)
        figures: dict[str, Any] = {"rows": []}
        section = {
            "title": title,
            "status": "failed",
            "reason": "interrupted",
            "limit_s": round(limit, 1),
            "seconds": 0.0,
            "figures": figures,
        }
        self.sections[letter] = section
        began = time.monotonic()
        try:
            if limit <= 0:
                raise Skipped("no time is left (--total)")
            with time_limit(limit):
                part(settings, figures, self.save)
            section |= {"status": "done", "reason": None}
        except Skipped as skipped:
            section |= {"status": "skipped", "reason": str(skipped)}
        except PartTimeout:
            section |= {"status": "failed", "reason": f"not finished after {limit:.4g} s (--limit {letter}=SECONDS)"}
        except FAILURES as error:
            section |= {"status": "failed", "reason": f"{type(error).__name__}: {error}"[:3000]}
        finally:
            section["seconds"] = round(time.monotonic() - began, 1)
            self.save()


def violations(report: Mapping[str, Any]) -> list[str]:
    """What is wrong with a report's form. Empty when readers can rely on it."""
    found = [f"{key} is missing" for key in ("command", "commit", "machine", "num_gpus", "dry", "parts") if key not in report]
    for letter, section in report.get("parts", {}).items():
        where = f"part {letter}"
        if letter not in PARTS:
            found.append(f"{where} is unknown")
        if section.get("status") not in STATUSES:
            found.append(f"{where}: status {section.get('status')!r} is none of {', '.join(STATUSES)}")
        if (section.get("status") == "done") != (section.get("reason") is None):
            found.append(f"{where}: status {section.get('status')!r} with reason {section.get('reason')!r}")
        rows = section.get("figures", {}).get("rows")
        if not isinstance(rows, list) or not all(isinstance(row, dict) and is_flat(row) for row in rows):
            found.append(f"{where}: figures.rows is no list of flat dictionaries")
        if section.get("status") == "done" and not rows:
            found.append(f"{where}: done without a figure")
    return found


def is_flat(row: Mapping[str, Any]) -> bool:
    return all(value is None or isinstance(value, str | int | float | bool) for value in row.values())
