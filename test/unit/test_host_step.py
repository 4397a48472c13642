"""The benchmark of host time drives the code that serves with stand-ins of its own; this shows that they still fit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PATHS = (ROOT / "python", ROOT / "sgl-kernel-dcp" / "python", ROOT)


@pytest.mark.parametrize(("load", "parts"), [("steady", {"tables"}), ("changing", {"tables", "new_tables"})])
def test_a_few_steps_are_measured(load: str, parts: set[str]) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, PATHS))}
    command = [sys.executable, "-m", "benchmark.host_step.measure", "--load", load, "--steps", "8", "--dirty-mb", "1"]
    ran = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    found = json.loads(ran.stdout.splitlines()[-1])
    assert found["steps"] == 8 and parts <= set(found["parts_p50_us"])
    assert ("changed_p50_us" in found) == (load == "changing")
