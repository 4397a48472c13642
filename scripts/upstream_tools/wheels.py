"""Gets a release's wheel from the package index, with pip and without dependencies."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


class DownloadError(RuntimeError):
    """pip could not get the wheel; the message ends with its own."""


def download_wheel(version: str, folder: Path) -> Path:
    """The wheel of sglang==version, in `folder`. One that is there already is used."""
    present = _find(version, folder)
    if present is not None:
        return present
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:"]
    command += ["--dest", str(folder), f"sglang=={version}"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheel = _find(version, folder)
    if result.returncode or wheel is None:
        raise DownloadError(f"sglang=={version} could not be downloaded:\n{result.stderr.strip()[-1500:]}")
    return wheel


def _find(version: str, folder: Path) -> Path | None:
    return next(iter(sorted(folder.glob(f"sglang-{version}-*.whl"))), None)
