"""Runs a module of this checkout as the main program, also where nothing is installed: its folders come first on PYTHONPATH."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import NoReturn

REPOSITORY = Path(__file__).resolve().parent.parent
FOLDERS = (REPOSITORY, REPOSITORY / "python", REPOSITORY / "sgl-kernel-dcp" / "python")


def run_as_module(name: str) -> NoReturn:
    """Goes on as `python -m NAME` with the same arguments, process id and working folder."""
    given = [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]
    ours = [str(folder) for folder in FOLDERS]
    os.environ["PYTHONPATH"] = os.pathsep.join(ours + [part for part in given if part not in ours])
    os.execv(sys.executable, [sys.executable, "-m", name, *sys.argv[1:]])
