#!/usr/bin/env bash
# cuda-tile: importing it makes a temporary folder, before anything is compiled and without a GPU; only an orderly exit takes it away.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" -q install --disable-pip-version-check cuda-tile==1.7.0
mkdir "$folder/temporary"
cd "$folder"
TMPDIR="$folder/temporary" "$folder/venv/bin/python" - <<'PY'
import os
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path


def left_by(end):
    """Folders that are there after a process that imports it and ends in this way."""
    code = f"import os, signal, cuda.tile; {end}"
    before = set(Path(os.environ["TMPDIR"]).iterdir())
    ended = subprocess.run([sys.executable, "-c", code]).returncode
    assert ended in (0, -signal.SIGTERM, -signal.SIGKILL), ended
    return len(set(Path(os.environ["TMPDIR"]).iterdir()) - before)


ends = {"returns": "pass", "SIGTERM": "os.kill(os.getpid(), signal.SIGTERM)", "SIGKILL": "os.kill(os.getpid(), signal.SIGKILL)"}
seen = {name: left_by(end) for name, end in ends.items()}
print(f"version  cuda-tile {version('cuda-tile')}")
print("guess    an import makes no files; what a compiler needs it makes when it compiles")
print(f"seen     folders left in TMPDIR by a process that only imports it, by its end: {seen}")
print("holds    servers that end their workers by a signal leave one folder per worker and start, in the temporary folder of the machine")
raise SystemExit(0 if seen == {"returns": 0, "SIGTERM": 1, "SIGKILL": 1} else 1)
PY
