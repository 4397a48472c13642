#!/usr/bin/env bash
# sglang: two seconds behind every streamed answer, complete ones too, it aborts whatever request has the same id by then.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
# The method needs no model: of sglang its source alone.
export PIP_NO_DEPS=1
"$folder/venv/bin/pip" -q install --disable-pip-version-check sglang==0.5.23 starlette==1.10.0 anyio==4.16.0 idna==3.20 typing_extensions==4.16.0
"$folder/venv/bin/python" - <<'PY'
import ast
import asyncio
import time
from importlib.metadata import distribution
from types import SimpleNamespace

from starlette.background import BackgroundTasks
from starlette.responses import StreamingResponse

source = distribution("sglang").locate_file("sglang/srt/managers/tokenizer_manager.py").read_text()
(manager,) = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == "TokenizerManager"]
(method,) = [node for node in manager.body if getattr(node, "name", "") == "create_abort_task"]
method.args.args[1].annotation = None
names = {"asyncio": asyncio, "BackgroundTasks": BackgroundTasks}
exec(compile(ast.Module([method], []), "tokenizer_manager.py", "exec"), names)

began, aborted = time.monotonic(), []


def abort(rid):
    aborted.append((rid, requests[rid], round(time.monotonic() - began)))


requests = {"turn": "the first request"}
front = SimpleNamespace(rid_to_state=requests, abort_request=abort)


async def tokens():
    yield b"data: all of it\n\n"
    del requests["turn"]  # it is complete, and its id free again


async def main():
    obj = SimpleNamespace(rid="turn", is_single=True)
    response = StreamingResponse(tokens(), background=names["create_abort_task"](front, obj))
    sent, connected = [], asyncio.Event()

    async def receive():
        await connected.wait()  # the client stays

    async def send(message):
        sent.append(message)

    answer = asyncio.create_task(response({"type": "http", "asgi": {"spec_version": "2.4"}}, receive, send))
    await asyncio.sleep(1)
    complete = sent[-1] == {"type": "http.response.body", "body": b"", "more_body": False}
    requests["turn"] = "the second request"
    await answer
    return complete


complete = asyncio.run(main())
print(f"version  sglang {distribution('sglang').version}, starlette {distribution('starlette').version}")
print("guess    a request is aborted when its client goes; one whose stream was read to its end is over")
print(f"seen     first stream complete and its client there: {complete}; aborted (id, whose it was, after s): {aborted}")
print("holds    who names requests (a turn of a conversation, a retry) and sends the next one soon loses it: ids must not come again")
raise SystemExit(0 if complete and aborted == [("turn", "the second request", 2)] else 1)
PY
