"""A stream that starts with an error becomes a plain error answer; any other stream stays as it is."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import HTTPException

from sglang_dcp.upstream.front.requests import ControlRefused, pause_generation, record_experts, refuse_control, serve_generate


def event(body: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(body, separators=(",", ":")).encode() + b"\n\n"


def serve(chunks: list[bytes], *, stream: bool = True) -> Any:
    async def body() -> AsyncIterator[bytes]:
        for chunk in chunks:
            yield chunk

    async def original(_obj: Any, _request: Any) -> Any:
        return SimpleNamespace(body_iterator=body(), background=None)

    async def run() -> Any:
        response = await serve_generate(original, SimpleNamespace(stream=stream), None)
        if hasattr(response, "status_code"):
            return response.status_code, json.loads(response.body)
        return [chunk async for chunk in response.body_iterator]

    return asyncio.run(run())


ERRORS = [
    ({"error": {"message": "no", "code": 400}}, 400),
    ({"text": "", "meta_info": {"finish_reason": {"type": "abort", "status_code": 503, "message": "no"}}}, 503),
]


@pytest.mark.parametrize(("body", "status"), ERRORS)
def test_first_chunk_is_an_error(body: dict[str, Any], status: int) -> None:
    code, answer = serve([event(body), b"data: [DONE]\n\n"])
    assert code == status
    assert answer["error"]["message"] == "no"


TEXTS = [
    [event({"text": '"status_code"', "meta_info": {"finish_reason": None}}), event({"error": {"message": "late"}})],
    [event({"text": '{"error"', "meta_info": {"finish_reason": {"type": "abort", "message": "by the client"}}})],
    [event({"text": "a", "meta_info": {}})],
    [],
]


@pytest.mark.parametrize("chunks", TEXTS)
def test_other_streams_are_unchanged(chunks: list[bytes]) -> None:
    assert serve(chunks) == chunks
    assert serve(chunks, stream=False) == chunks


def test_refused_control() -> None:
    async def open_session(_manager: Any, _obj: Any) -> None:
        raise AssertionError("must not be called")

    with pytest.raises(ControlRefused) as failure:
        asyncio.run(refuse_control(open_session)(None, None))
    assert failure.value.status_code == 400
    assert str(failure.value).startswith("open_session does not work with --enable-dyncp")


@pytest.mark.parametrize("mode", ["in_place", "abort", "retract"])
def test_modes_of_a_pause(mode: str) -> None:
    paused: list[str] = []

    async def pause(_manager: Any, obj: Any) -> None:
        paused.append(obj.mode)

    async def get_internal_state() -> None:
        paused.append("answered")

    call = pause_generation(pause, SimpleNamespace(get_internal_state=get_internal_state), SimpleNamespace(mode=mode))
    if mode != "retract":
        asyncio.run(call)
        assert paused == [mode] + ["answered"] * (mode == "abort"), "instances have aborted before requests are let in"
        return
    with pytest.raises(ControlRefused, match='pause_generation with mode "retract" does not work with --enable-dyncp') as failure:
        asyncio.run(call)
    assert (failure.value.status_code, paused) == (400, [])


@pytest.mark.parametrize("mode", [None, "stat"])
def test_recording_experts_needs_a_recorder(mode: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the schedulers the call raises without one, and ends them all; a GET is enough."""
    settings = SimpleNamespace(moe=SimpleNamespace(expert_distribution_recorder_mode=mode))
    monkeypatch.setattr("sglang.srt.runtime_context.get_exec", lambda: settings)
    calls: list[Any] = []

    async def start_expert_distribution_record(manager: Any) -> None:
        calls.append(manager)

    call = record_experts(start_expert_distribution_record, "manager")
    if mode is not None:
        asyncio.run(call)
        assert calls == ["manager"]
        return
    with pytest.raises(HTTPException, match="start_expert_distribution_record needs .* --expert-distribution-recorder-mode") as failure:
        asyncio.run(call)
    assert (failure.value.status_code, calls) == (400, [])
