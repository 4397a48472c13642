#!/usr/bin/env bash
# uvicorn: with several workers the parent takes SIGQUIT (and SIGUSR1, SIGUSR2) away from the program's own handler, and drops it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" -q install --disable-pip-version-check uvicorn==0.54.0
cd "$folder"
cat > serve.py <<'PY'
import os
import signal
import sys

import uvicorn


async def application(scope, receive, send):
    """Starts, and answers nothing: no request is sent."""
    while scope["type"] == "lifespan":
        message = await receive()
        await send({"type": message["type"] + ".complete"})
        if message["type"] == "lifespan.shutdown":
            return
        print("started", flush=True)


def own_handler(number, frame):
    """What an engine does when one of its processes tells it of a failure."""
    os._exit(7)


if __name__ == "__main__":
    signal.signal(signal.SIGQUIT, own_handler)
    uvicorn.run("serve:application", port=int(sys.argv[2]), workers=int(sys.argv[1]), log_level="error")
PY
"$folder/venv/bin/python" - <<'PY'
import signal
import socket
import subprocess
import sys
from importlib.metadata import version


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def end_by_sigquit(workers):
    """Exit code after SIGQUIT; None where the program serves on for five seconds."""
    command = [sys.executable, "serve.py", str(workers), str(free_port())]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    for _ in range(workers):
        process.stdout.readline()
    process.send_signal(signal.SIGQUIT)
    try:
        return process.wait(5)
    except subprocess.TimeoutExpired:
        process.terminate()
        process.wait(20)
        return None


seen = {f"workers={workers}": end_by_sigquit(workers) for workers in (1, 2)}
print(f"version  uvicorn {version('uvicorn')}")
print("guess    uvicorn stops on SIGINT and SIGTERM; a handler that the program set for SIGQUIT keeps running, whatever the number of workers")
print(f"seen     exit code after SIGQUIT, None where it serves on: {seen}")
print("holds    an engine whose processes report a failure to their parent by SIGQUIT ends with one HTTP worker and serves dead requests with two")
raise SystemExit(0 if seen == {"workers=1": 7, "workers=2": None} else 1)
PY
