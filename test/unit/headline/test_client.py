"""What the client measures, of a server that stands in for SGLang: streams that end, fail, are refused or cut off; and that it empties."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp import web

from benchmark.headline.client import Arrival, Served, send_all
from benchmark.headline.measure import wait_empty

REFUSED, SHORT, WRONG, DEAF = 13, 7, 8, 9
"""Prompts by length: HTTP 400; a token too few; an error in the stream; a stream that does not end when it is aborted."""


class StandIn:
    """Streams a token every 10 ms."""

    def __init__(self, abort_status: int = 200) -> None:
        self.aborted = asyncio.Event()
        self.asked: list[dict[str, Any]] = []
        self.abort_status = abort_status

    async def generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        length, total = len(body["input_ids"]), body["sampling_params"]["max_new_tokens"]
        if length == REFUSED:
            return web.Response(status=400, text="no")
        response = web.StreamResponse()
        await response.prepare(request)

        async def write(event: dict[str, Any]) -> None:
            await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")

        for count in range(1, total + 1 - (length == SHORT)):
            ends = "length" if count == total else None
            if self.aborted.is_set() and length != DEAF:
                ends = "abort"
            meta: dict[str, Any] = {"finish_reason": ends and {"type": ends}, "completion_tokens": count, "cached_tokens": 0}
            # The text of an answer may look like a count.
            await write({"text": '"meta_info" "completion_tokens":99', "meta_info": meta | ({"dyncp": {"degree_end": 2}} if ends else {})})
            if ends:
                break
            if length == WRONG:
                await write({"error": {"message": "broken"}})
                break
            await asyncio.sleep(0.01)
        await response.write(b"data: [DONE]\n\n")
        return response

    async def abort(self, request: web.Request) -> web.Response:
        self.asked.append(await request.json())
        self.aborted.set()
        return web.Response(status=self.abort_status)


def send(arrivals: list[Arrival], ends_s: float | None = None, abort_status: int = 200) -> tuple[list[Served], StandIn]:
    async def run() -> tuple[list[Served], StandIn]:
        stand_in, app = StandIn(abort_status), web.Application()
        app.router.add_post("/generate", stand_in.generate)
        app.router.add_post("/abort_request", stand_in.abort)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]
        try:
            return await send_all(f"http://127.0.0.1:{port}", arrivals, seed=1, timeout_s=10, ends_s=ends_s), stand_in
        finally:
            await runner.cleanup()

    return asyncio.run(run())


def test_it_counts_what_comes_between_the_first_and_the_last_event() -> None:
    asked = [Arrival(0.0, 5, 6), Arrival(0.01, SHORT, 6), Arrival(0.02, REFUSED, 6), Arrival(0.03, WRONG, 6)]
    (whole, short, refused, wrong), stand_in = send(asked)
    assert whole.error is None and whole.tokens == 5 and whole.tpot_ms is not None and whole.tpot_ms > 5 and whole.degree == 2
    assert whole.event_tokens == [1, 2, 3, 4, 5, 6] and whole.event_s == sorted(whole.event_s) and len(whole.event_s) == 6
    assert short.error is not None and short.error.startswith("5 of 6 tokens")
    assert refused.error == "HTTP 400: no" and refused.tpot_ms is None
    assert wrong.error is not None and "broken" in wrong.error and wrong.event_tokens == [1]
    assert stand_in.asked == [] and not any(one.cut for one in (whole, short, refused, wrong))


def test_what_streams_at_the_end_is_cut_off_and_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmark.headline.client.CLOSE_S", 0.3)
    asked = [Arrival(0.0, 5, 6), Arrival(0.0, 6, 2000), Arrival(0.0, DEAF, 2000), Arrival(0.0, REFUSED, 6), Arrival(0.0, SHORT, 6)]
    (whole, long, deaf, refused, short), stand_in = send(asked, ends_s=0.5)
    assert stand_in.asked == [{"rid": "", "abort_all": True}]
    assert not whole.cut and whole.error is None and whole.event_tokens[-1] == 6
    assert long.cut and long.error is None and 1 < long.event_tokens[-1] < 2000 and long.degree == 2
    assert deaf.cut and deaf.error is None and deaf.degree is None and deaf.tokens > 1, "closed: nobody said where it lived"
    assert refused.error and short.error and not refused.cut and not short.cut


def test_a_server_that_does_not_abort_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="/abort_request: HTTP 500"):
        send([Arrival(0.0, 6, 300)], ends_s=0.1, abort_status=500)


@contextmanager
def loads(monkeypatch: pytest.MonkeyPatch, *answers: tuple[int, int]) -> Iterator[Any]:
    """A server of two instances; each answer is what they hold, the last one for ever."""
    left = list(answers)

    def json_of(*_request: str) -> dict[str, Any]:
        held = left.pop(0) if len(left) > 1 else left[0]
        return {"loads": [{"num_running_reqs": count, "num_waiting_reqs": 0} for count in held]}

    monkeypatch.setattr("benchmark.headline.measure.POLL_S", 0.001)
    yield SimpleNamespace(name="ours", client=SimpleNamespace(json=json_of))


def test_a_server_is_empty_when_it_says_so_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    with loads(monkeypatch, (3, 0), (0, 0), (1, 0), (0, 0)) as server:
        assert wait_empty(server, 5.0) < 5.0


def test_requests_that_stay_are_an_error_that_names_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    with loads(monkeypatch, (0, 2)) as server, pytest.raises(RuntimeError, match=r"ours still holds \[0, 2\] requests 0.05 s after"):
        wait_empty(server, 0.05)
