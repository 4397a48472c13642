"""Where a figure comes from: command, commit and machine."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def provenance(command: str) -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    return {"command": command, "commit": commit, "machine": f"{platform.machine()}, {os.cpu_count()} cores, no GPU"}
