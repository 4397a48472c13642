#!/usr/bin/env bash
# Creates the virtual environment and installs SGLang, this package and the test tools with pip. Can be repeated.
# usage: setup.sh FOLDER
set -euo pipefail

venv=${1:?usage: setup.sh FOLDER}
needed_gib=14

find_python() {
  local candidate
  for candidate in python3.12 python3.11 python3.13 python3; do
    if command -v "$candidate" >/dev/null && "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "setup: needs Python 3.11 or newer with the venv module (Debian and Ubuntu: apt-get install python3-venv)" >&2
  return 1
}

if [ ! -x "$venv/bin/python" ]; then
  python=$(find_python)
  free_gib=$(($(df -Pk . | awk 'NR == 2 {print $4}') / 1048576))
  if [ "$free_gib" -lt "$needed_gib" ]; then
    echo "setup: $free_gib GiB free here, SGLang and torch need $needed_gib GiB" >&2
    exit 1
  fi
  echo "setup: creating $venv with $("$python" --version)"
  "$python" -m venv "$venv"
fi

echo "setup: installing sglang==$(cat UPSTREAM_VERSION) and the test tools (11 GB, about 3 minutes the first time)"
"$venv/bin/python" -m pip install --disable-pip-version-check --progress-bar on --editable ".[test,dev]"
"$venv/bin/python" -m pip check >/dev/null 2>&1 || echo "setup: note: pip check reports conflicts between SGLang's own dependencies"
echo "setup: done"
