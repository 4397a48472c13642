#!/usr/bin/env bash
# Mooncake transfer engine: the port in its own address is not the one that it listens on.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" -q install --disable-pip-version-check mooncake-transfer-engine-non-cuda==0.3.13.post1
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import ctypes
import socket
from importlib.metadata import version

try:
    ctypes.CDLL("libibverbs.so.1")
except OSError:
    raise SystemExit("this finding needs the system library libibverbs1 (apt-get install libibverbs1)")

from mooncake.engine import TransferEngine


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def listens(port):
    with socket.socket() as client:
        client.settimeout(5)
        return client.connect_ex(("127.0.0.1", port)) == 0


asked = free_port()
engine = TransferEngine()
code = engine.initialize(f"127.0.0.1:{asked}", "P2PHANDSHAKE", "tcp", "")
given = engine.get_rpc_port()
seen = {"initialize": code, "listens on the port asked for": listens(asked), "listens on another port": given != asked and listens(given)}
print(f"version  mooncake-transfer-engine-non-cuda {version('mooncake-transfer-engine-non-cuda')}")
print("guess    a peer reaches the engine at the host:port that initialize was given, or initialize fails")
print(f"seen     {seen}")
print("holds    firewalls and peers of a prefill/decode pair must be told get_rpc_port(); the port in the address is not used")
raise SystemExit(0 if list(seen.values()) == [0, False, True] else 1)
PY
