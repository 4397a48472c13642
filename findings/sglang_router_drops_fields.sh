#!/usr/bin/env bash
# sglang-router: fields that SGLang serves and the router does not know are taken out of a request on the way, and the answer is HTTP 200.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
# Of sglang its source alone, which says which fields its server takes; what the router needs is named.
export PIP_NO_DEPS=1
"$folder/venv/bin/pip" -q install --disable-pip-version-check sglang==0.5.23 sglang-router==0.3.2 aiohappyeyeballs==2.7.1 aiohttp==3.14.5 aiosignal==1.4.0 annotated-doc==0.0.7 annotated-types==0.8.0 anyio==4.16.0 attrs==26.1.0 click==8.5.1 fastapi==0.165.0 frozenlist==1.8.0 h11==0.16.0 idna==3.20 multidict==7.2.1 opentelemetry-api==1.45.2 orjson==3.13.0 propcache==0.5.4 pydantic==2.14.4 pydantic_core==2.50.5 setproctitle==1.3.8 starlette==1.10.0 typing-inspection==0.4.5 typing_extensions==4.16.0 uvicorn==0.54.0 yarl==1.25.1
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import ast
import json
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import distribution, version

ANSWERS = {
    "/health": {},
    "/server_info": {"model_path": "m", "served_model_name": "m", "tp_size": 1, "dp_size": 1},
    "/model_info": {"model_path": "m", "is_generation": True},
}
GENERATED = {"text": "", "output_ids": [1], "meta_info": {"id": "a", "finish_reason": {"type": "length"}}}
received = []


class Server(BaseHTTPRequestHandler):
    """As much of an SGLang server as the router asks for."""

    def log_message(self, *_):
        pass

    def answer(self, body, status=200):
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def do_GET(self):
        found = ANSWERS.get(self.path)
        self.answer(found or {}, 404 if found is None else 200)

    def do_POST(self):
        received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.answer(GENERATED)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def fields(path, name):
    """What a class of sglang's source declares."""
    tree = ast.parse(distribution("sglang").locate_file(path).read_text())
    (found,) = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == name]
    return {item.target.id for item in found.body if isinstance(item, ast.AnnAssign)}


def post(path, body):
    """HTTP status, and what the server got of it."""
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"})
    return urllib.request.urlopen(request, timeout=30).status, received.pop()


def ready():
    try:
        return urllib.request.urlopen(f"http://127.0.0.1:{port}/readiness", timeout=5).status == 200
    except OSError:
        return False


sampling = {"custom_params": {"mine": 1}, "logit_bias": {"3": 5.0}, "stop_regex": "a+", "structural_tag": "{}"}
extra = {"custom_params": {"mine": 1}, "rid": "turn-7", "priority": 3, "logit_bias": {"3": 5.0}}
openai = "sglang/srt/entrypoints/openai/protocol.py"
assert set(sampling) <= fields("sglang/srt/sampling/sampling_params.py", "SamplingParams")
assert set(extra) <= fields(openai, "ChatCompletionRequest") & fields(openai, "CompletionRequest")

server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
threading.Thread(target=server.serve_forever, daemon=True).start()
port = free_port()
command = [sys.executable, "-m", "sglang_router.launch_router", "--worker-urls", f"http://127.0.0.1:{server.server_port}"]
command += ["--host", "127.0.0.1", "--port", str(port), "--prometheus-host", "127.0.0.1", "--prometheus-port", str(free_port())]
with open("router.log", "w") as log:
    router = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
try:
    deadline = time.monotonic() + 60
    while not ready() and time.monotonic() < deadline:
        time.sleep(0.2)
    lost = {}
    status, got = post("/generate", {"text": "a", "sampling_params": {"max_new_tokens": 1, **sampling}})
    lost["/generate"] = status, sorted(set(sampling) - set(got["sampling_params"]))
    chat = {"model": "m", "messages": [{"role": "user", "content": "a"}]}
    for path, body in (("/v1/chat/completions", chat), ("/v1/completions", {"model": "m", "prompt": "a"})):
        status, got = post(path, {**body, **extra})
        lost[path] = status, sorted(set(extra) - set(got))
finally:
    router.terminate()
    router.wait(30)
print(f"version  sglang-router {version('sglang-router')}, sglang {version('sglang')}")
print("guess    a field goes through to the server, as it does on one path, or is refused")
print(f"seen     HTTP status and what the server never got: {lost}")
print("holds    a bias, a stop pattern, a priority or an id to abort by has no effect behind the router, and nobody is told")
expected = {
    "/generate": (200, sorted(sampling)),
    "/v1/chat/completions": (200, ["custom_params", "priority", "rid"]),
    "/v1/completions": (200, []),
}
raise SystemExit(0 if lost == expected else 1)
PY
