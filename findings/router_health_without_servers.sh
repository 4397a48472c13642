#!/usr/bin/env bash
# sglang-router: /health and /liveness answer 200 while it knows no server and every request is refused.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" -q install --disable-pip-version-check sglang-router==0.3.2
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from importlib.metadata import version


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def status(url):
    try:
        return urllib.request.urlopen(url, timeout=5).status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None


# A server that is still loading its model: the port is known, nobody listens yet.
port, server_port = free_port(), free_port()
command = [sys.executable, "-m", "sglang_router.launch_router", "--worker-urls", f"http://127.0.0.1:{server_port}"]
command += ["--host", "127.0.0.1", "--port", str(port), "--prometheus-host", "127.0.0.1", "--prometheus-port", str(free_port())]
with open("router.log", "w") as log:
    router = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
try:
    paths = ("/health", "/liveness", "/readiness", "/health_generate", "/v1/models")
    deadline = time.monotonic() + 60
    while status(f"http://127.0.0.1:{port}/health") is None and time.monotonic() < deadline:
        time.sleep(0.2)
    seen = {path: status(f"http://127.0.0.1:{port}{path}") for path in paths}
finally:
    router.terminate()
    router.wait(30)
print(f"version  sglang-router {version('sglang-router')}")
print("guess    /health is red until a server can answer, as it is on the servers themselves")
print(f"seen     with one server that is not up yet: {seen}")
print("holds    a load balancer or a test that waits for /health sends requests into HTTP 503; /readiness is what to wait for")
raise SystemExit(0 if seen == {"/health": 200, "/liveness": 200, "/readiness": 503, "/health_generate": 503, "/v1/models": 503} else 1)
PY
