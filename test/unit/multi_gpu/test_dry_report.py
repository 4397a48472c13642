"""The report's dry form, as a user calls it: four gloo ranks on the CPU, the JSON, the table, the exit code, and nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmark.multi_gpu.report import violations

SCRIPT = Path(__file__).resolve().parents[3] / "scripts" / "multi_gpu_report.py"
LIMIT_S = 200.0
"""Seconds on an idle machine are about 15; a busy one must not turn the test red."""


def start(tmp_path: Path, *flags: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(SCRIPT), "--dry", "--out", str(tmp_path / "report.json"), "--work", str(tmp_path / "work"), *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def finish(process: subprocess.Popen[str], tmp_path: Path) -> tuple[int, str, dict[str, Any]]:
    try:
        output, errors = process.communicate(timeout=LIMIT_S)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert leftovers(process.pid) == []
    path = tmp_path / "report.json"
    return process.returncode, output + errors, json.loads(path.read_text()) if path.is_file() else {}


def leftovers(group: int, wait_s: float = 10.0) -> list[int]:
    """Processes of the report's session that are still there after a moment."""
    deadline = time.monotonic() + wait_s
    while True:
        found = []
        for process in psutil.process_iter():
            try:
                if os.getsid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process.pid)
            except (ProcessLookupError, psutil.NoSuchProcess):
                continue
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.1)


def test_the_dry_form_measures_predicts_and_says_what_it_left_out(tmp_path: Path) -> None:
    code, output, report = finish(start(tmp_path), tmp_path)
    assert code == 0, output[-3000:]
    assert violations(report) == []
    statuses = {letter: section["status"] for letter, section in report["parts"].items()}
    assert statuses == {"a": "done", "b": "skipped", "c": "skipped", "d": "skipped", "e": "skipped", "f": "done"}
    assert all("--servers" in report["parts"][letter]["reason"] for letter in "bde")
    rows = report["parts"]["a"]["figures"]["rows"]
    assert {(row["transport"], row["pattern"], row["rows"]) for row in rows} == {
        ("gloo", pattern, count) for pattern in ("every home", "one home") for count in (1, 4)
    }
    assert all(row[stage] > 0 for row in rows for stage in ("dispatch_us", "return_us", "merge_us", "total_us", "bytes"))
    predicted = report["parts"]["f"]["figures"]["rows"]
    assert len(predicted) == len(rows) and all(line["predicted"] > 0 for line in predicted)
    for text in ("(a) transport: done", "(e) stock DP against dyncp: skipped", "nanocp_us", "predicted"):
        assert text in output


def test_a_rank_that_dies_fails_its_part_by_name(tmp_path: Path) -> None:
    code, output, report = finish(start(tmp_path, "--parts", "a,c", "--kill-rank", "2"), tmp_path)
    assert code == 1, output[-3000:]
    assert violations(report) == []
    assert report["parts"]["a"]["status"] == "failed"
    assert "rank 2 ended without a result (exit code 17)" in report["parts"]["a"]["reason"]
    assert report["parts"]["c"]["status"] == "skipped"
    assert "(a) transport: failed" in output


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--parts", "a,x"], "--parts x"),
        (["--limit", "a"], "--limit a: PART=SECONDS"),
        (["--limit", "z=3"], "--limit z=3"),
        (["--num-gpus", "3"], "--num-gpus 3"),
    ],
)
def test_a_wrong_flag_is_named(tmp_path: Path, flags: list[str], message: str) -> None:
    code, output, report = finish(start(tmp_path, *flags), tmp_path)
    assert code != 0 and message in output and report == {}
