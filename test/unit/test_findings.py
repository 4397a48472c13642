"""The form of findings/*.sh: pinned packages in a temporary folder, this project left out, and the lines that a reader needs."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "findings"
SCRIPTS = sorted(FOLDER.glob("*.sh"))
PRINTED = ("version", "guess", "seen", "holds")


def test_there_are_findings() -> None:
    assert len(SCRIPTS) >= 5


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_form(path: Path) -> None:
    text = path.read_text()
    assert subprocess.run(["bash", "-n", str(path)], check=False).returncode == 0
    first, second = text.splitlines()[:2]
    assert first == "#!/usr/bin/env bash" and re.match(r"# [^.]+: ", second), "the second line says which library does what"
    assert "set -euo pipefail" in text and "mktemp -d" in text and 'rm -rf "$folder"' in text
    (installed,) = re.findall(r"pip\" -q install --disable-pip-version-check (.+)", text)
    assert all(re.fullmatch(r"[\w\[\]-]+==[\w.]+", package) for package in installed.split()), installed
    for name in PRINTED:
        assert re.search(rf'print\(f?"{name:<8} ', text), f"no line of {name}"
    assert "raise SystemExit(0 if " in text, "fails when what is seen changes"
    assert "sglang_dcp" not in text
