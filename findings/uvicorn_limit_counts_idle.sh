#!/usr/bin/env bash
# uvicorn: limit_concurrency=N admits N - 1 connections, and those that idle count; with 1 every request is refused.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" -q install --disable-pip-version-check uvicorn==0.54.0 httpx==0.28.1
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import asyncio
from importlib.metadata import version

import httpx
import uvicorn


async def application(scope, receive, send):
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"ok"})


async def statuses(limit, num_clients=4):
    """Status of one request from each of some clients, one after the other; every client keeps its connection."""
    config = uvicorn.Config(application, host="127.0.0.1", port=0, limit_concurrency=limit, log_level="critical")
    server = uvicorn.Server(config)
    task = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.02)
    port = server.servers[0].sockets[0].getsockname()[1]
    clients = [httpx.AsyncClient() for _ in range(num_clients)]
    codes = [(await client.get(f"http://127.0.0.1:{port}/")).status_code for client in clients]
    for client in clients:
        await client.aclose()
    server.should_exit = True
    await task
    return codes


async def main():
    seen = {limit: await statuses(limit) for limit in (1, 2, 3)}
    print(f"version  uvicorn {version('uvicorn')}")
    print("guess    requests one after the other never exceed a limit of 1: all are 200")
    print(f"seen     by limit_concurrency, four clients in turn that keep their connections: {seen}")
    print("holds    a limit meant for running requests refuses the pool of an idle client, and a health probe beside it")
    return seen == {1: [503] * 4, 2: [200, 503, 503, 503], 3: [200, 200, 503, 503]}


raise SystemExit(0 if asyncio.run(main()) else 1)
PY
