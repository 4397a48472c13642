"""Report, load and live page over HTTP: who may read them, what they cost, and what a silent instance makes of them."""

from __future__ import annotations

import asyncio
import functools
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from sglang_dcp.observe.report_client import LIVE_ROUTE, LOAD_RID, LOAD_ROUTE, REPORT_RID, ROUTE
from sglang_dcp.upstream.front import live, result

ADMIN, USER = "Bearer admin", "Bearer user"
ACCESS = [
    (None, None, None, True),
    ("user", None, None, False),
    ("user", None, USER, True),
    (None, "admin", None, False),
    (None, "admin", USER, False),
    (None, "admin", ADMIN, True),
    ("user", "admin", USER, False),
    ("user", "admin", ADMIN, True),
]
FIGURES = {"pool_tokens": 64, "kv_tokens": 16, "guest_tokens": 0, "queued": 0, "retained_tokens": 3}


def answers_of(rank: int) -> dict[str, dict[str, Any]]:
    return {
        REPORT_RID: FIGURES | {"rank": rank, "host_us": {}, "running": [], "finished": []},
        LOAD_RID: FIGURES | {"rank": rank, "home_requests": 1, "degrees": {"1": 1, "10": rank}, "longest": []},
    }


class Instances:
    """Stands in for two schedulers behind SGLang's tokenizer manager. `asked`: the questions that went to them."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.silent = False

    async def ask(self, question: Any) -> list[Any]:
        self.asked.append(question.rid)
        while self.silent:
            await asyncio.sleep(0.01)
        return [SimpleNamespace(internal_state=answers_of(rank)[question.rid]) for rank in (1, 0)]


def make_app(
    monkeypatch: pytest.MonkeyPatch,
    instances: Instances,
    api_key: str | None = None,
    admin_api_key: str | None = None,
    *,
    behind_middleware: bool = True,
) -> FastAPI:
    """Our routes, behind SGLang's middleware as its HTTP server builds them, or without, as its tokenizer workers do."""
    from sglang.srt import runtime_context
    from sglang.srt.utils import auth

    manager = SimpleNamespace(auto_create_handle_loop=lambda: None, get_internal_state_communicator=instances.ask)
    app = FastAPI()
    stand_in = SimpleNamespace(app=app, get_global_state=lambda: SimpleNamespace(tokenizer_manager=manager))
    monkeypatch.setitem(sys.modules, "sglang.srt.entrypoints.http_server", stand_in)
    serving = SimpleNamespace(fastapi_root_path="/proxied", api_key=api_key, admin_api_key=admin_api_key)
    monkeypatch.setattr(runtime_context, "get_serving", lambda: serving)
    monkeypatch.setattr(auth, "decide_request_auth", functools.partial(live.open_page, auth.decide_request_auth))
    result.add_report_route()
    live.add_live_routes()
    app.get("/dyncp/live/other")(result.serve_report)
    if behind_middleware and (api_key or admin_api_key):
        auth.add_api_key_middleware(app, api_key=api_key, admin_api_key=admin_api_key)
    return app


@pytest.mark.parametrize("behind_middleware", [True, False])
@pytest.mark.parametrize(("api_key", "admin_api_key", "header", "allowed"), ACCESS)
def test_figures_are_an_administrators_call(
    api_key: str | None,
    admin_api_key: str | None,
    header: str | None,
    allowed: bool,
    behind_middleware: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    instances = Instances()
    client = TestClient(make_app(monkeypatch, instances, api_key, admin_api_key, behind_middleware=behind_middleware))
    for route in (ROUTE, LOAD_ROUTE):
        answer = client.get(route, headers={"Authorization": header} if header else {})
        assert answer.status_code == (200 if allowed else 401)
        if allowed:
            told = answer.json()["instances"]
            assert [instance["rank"] for instance in told] == [0, 1]
            assert told[0]["retained_tokens"] == 3, "figures that instances add reach the reader"
    assert instances.asked == ([REPORT_RID, LOAD_RID] if allowed else [])


def test_the_page_needs_no_key_and_nothing_else_is_open(monkeypatch: pytest.MonkeyPatch) -> None:
    client = TestClient(make_app(monkeypatch, Instances(), "user", "admin"))
    answer = client.get(LIVE_ROUTE)
    assert answer.status_code == 200
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert client.post(LIVE_ROUTE).status_code == 401
    for path in ("/dyncp/live/other", "/dyncp/liv", "/x/dyncp/live", "/dyncp/load?x=/dyncp/live", "/dyncp/requests#/dyncp/live"):
        assert client.get(path).status_code == 401, path


def test_the_page_behind_a_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    app = make_app(monkeypatch, Instances(), "user")
    assert TestClient(app, root_path="/proxied").get(f"/proxied{LIVE_ROUTE}").status_code == 200


def test_degrees_are_summed_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    degrees = TestClient(make_app(monkeypatch, Instances())).get(LOAD_ROUTE).json()["degrees"]
    assert list(degrees.items()) == [("1", 2), ("10", 1)]


def test_many_readers_ask_the_schedulers_once() -> None:
    made: list[int] = []
    now = [0.0]

    async def read() -> int:
        made.append(1)
        await asyncio.sleep(0.01)
        return len(made)

    async def scenario() -> None:
        reading = live.SharedReading(read, clock=lambda: now[0])
        assert await asyncio.gather(*(reading.get() for _ in range(50))) == [1] * 50
        assert await reading.get() == 1
        now[0] += live.KEPT_SECONDS
        assert await asyncio.gather(*(reading.get() for _ in range(50))) == [2] * 50

    asyncio.run(scenario())


def test_a_silent_instance_is_503_and_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks later waits for the same answer: questions do not pile up, and none is given up half way."""
    monkeypatch.setattr(live, "ANSWER_LIMIT_SECONDS", 0.05)
    instances = Instances()
    instances.silent = True
    with TestClient(make_app(monkeypatch, instances)) as client:
        for _ in range(3):
            answer = client.get(LOAD_ROUTE)
            assert (answer.status_code, "gave no answer" in answer.text) == (503, True)
        assert instances.asked == [LOAD_RID]
        instances.silent = False
        assert client.get(LOAD_ROUTE).status_code == 200
    assert instances.asked == [LOAD_RID]


def test_a_failed_reading_is_made_again() -> None:
    tries: list[int] = []

    async def read() -> str:
        tries.append(1)
        if len(tries) == 1:
            raise RuntimeError("no route")
        return "load"

    async def scenario() -> None:
        reading = live.SharedReading(read)
        with pytest.raises(RuntimeError, match="no route"):
            await reading.get()
        assert await reading.get() == "load"

    asyncio.run(scenario())
