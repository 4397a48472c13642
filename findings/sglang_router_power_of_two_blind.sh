#!/usr/bin/env bash
# sglang-router: its policy power_of_two asks servers for their load at a path that SGLang has no longer, and then chooses as if by chance.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
# Of sglang its source alone, which says what its server answers; what the router needs is named.
export PIP_NO_DEPS=1
"$folder/venv/bin/pip" -q install --disable-pip-version-check sglang==0.5.23 sglang-router==0.3.2 aiohappyeyeballs==2.7.1 aiohttp==3.14.5 aiosignal==1.4.0 annotated-doc==0.0.7 annotated-types==0.8.0 anyio==4.16.0 attrs==26.1.0 click==8.5.1 fastapi==0.165.0 frozenlist==1.8.0 h11==0.16.0 idna==3.20 multidict==7.2.1 opentelemetry-api==1.45.2 orjson==3.13.0 propcache==0.5.4 pydantic==2.14.4 pydantic_core==2.50.5 setproctitle==1.3.8 starlette==1.10.0 typing-inspection==0.4.5 typing_extensions==4.16.0 uvicorn==0.54.0 yarl==1.25.1
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import json
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import distribution, version

FACTS = {
    "/health": {},
    "/server_info": {"model_path": "m", "served_model_name": "m", "tp_size": 1, "dp_size": 1},
    "/model_info": {"model_path": "m", "is_generation": True},
}
GENERATED = {"text": "", "output_ids": [1], "meta_info": {"id": "a", "finish_reason": {"type": "length"}}}
NUM_REQUESTS, BUSY = 40, 90


class Handler(BaseHTTPRequestHandler):
    """As much of an SGLang server as the router asks for, with the load that it has from others."""

    def log_message(self, *_):
        pass

    def answer(self, body, status=200):
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def do_GET(self):
        path = self.path.split("?")[0]
        if "load" in path:
            self.server.asked.add(path)
        found = (FACTS | self.server.loads).get(path)
        self.answer({} if found is None else found, 404 if found is None else 200)

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.num_served += 1
        self.answer(GENERATED)


def serve(loads):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.loads, server.asked, server.num_served = loads, set(), 0
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(servers):
    port = free_port()
    command = [sys.executable, "-m", "sglang_router.launch_router", "--policy", "power_of_two", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--prometheus-host", "127.0.0.1", "--prometheus-port", str(free_port())]
    command += ["--worker-urls", *(f"http://127.0.0.1:{server.server_port}" for server in servers)]
    with open(f"router{port}.log", "w") as log:
        return port, subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)


def today(load):
    """The path that sglang 0.5.23 has."""
    row = {"dp_rank": 0, "num_running_reqs": load, "num_waiting_reqs": 0, "num_used_tokens": 1000 * load}
    return {"/v1/loads": {"version": "0.5.23", "dp_rank_count": 1, "loads": [row]}}


def before(load):
    """The path that it had."""
    return {"/get_load": [{"dp_rank": 0, "num_reqs": load, "num_waiting_reqs": 0, "num_tokens": 1000 * load}]}


source = "".join(
    distribution("sglang").locate_file(f"sglang/srt/entrypoints/{name}.py").read_text() for name in ("http_server", "v1_loads")
)
has = {path: f'"{path}"' in source for path in ("/get_load", "/v1/loads")}
pairs = {make.__name__: [serve(make(BUSY)), serve(make(0))] for make in (today, before)}
routers = {name: start(pair) for name, pair in pairs.items()}
try:
    deadline = time.monotonic() + 90  # it asks twice a minute
    while not all(server.asked for pair in pairs.values() for server in pair) and time.monotonic() < deadline:
        time.sleep(0.5)
    time.sleep(2)
    for port, _ in routers.values():
        body = json.dumps({"text": "a", "sampling_params": {"max_new_tokens": 1}}).encode()
        for _ in range(NUM_REQUESTS):
            request = urllib.request.Request(f"http://127.0.0.1:{port}/generate", body, {"Content-Type": "application/json"})
            urllib.request.urlopen(request, timeout=30).read()
finally:
    for _, router in routers.values():
        router.terminate()
        router.wait(30)
asked = set().union(*(server.asked for pair in pairs.values() for server in pair))
served = {name: [server.num_served for server in pair] for name, pair in pairs.items()}
print(f"version  sglang-router {version('sglang-router')}, sglang {version('sglang')}")
print("guess    the newest router knows the load of the newest servers: of two, an idle one gets the requests")
print(f"seen     it asks {sorted(asked)}; sglang has {has}; of {NUM_REQUESTS} requests [busy, idle] got {served}")
print("holds    load from elsewhere (a second router, long contexts) is not seen, with the very policy that is to heed it")
blind = min(served["today"]) >= NUM_REQUESTS // 8
raise SystemExit(0 if asked == {"/get_load"} and has == {"/get_load": False, "/v1/loads": True} and blind and served["before"] == [0, NUM_REQUESTS] else 1)
PY
