"""The report of an instance and who may read it: no health probes, ids of bounded length, SGLang's own rule for administrators' calls."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from sglang_dcp.observe.report_client import ROUTE
from sglang_dcp.observe.request_log import LONGEST_ID, RequestLog
from sglang_dcp.upstream.front import result
from sglang_dcp.upstream.observe import report
from sglang_dcp.upstream.observe.host_clock import HostClock
from sglang_dcp.upstream.step.queues import Queues


class Request:
    """As much of SGLang's Req as a report reads."""

    def __init__(self, rid: str, ended: bool = False) -> None:
        self.rid, self.dyncp = rid, None
        self.origin_input_ids, self.output_ids = [1] * 20, [2] * 3
        self.finished_reason = SimpleNamespace(to_json=lambda: {"type": "length"})
        self._ended = ended

    def finished(self) -> bool:
        return self._ended


def make_runtime(**scheduler: Any) -> Any:
    pool = SimpleNamespace(num_givable_pages=lambda: 60)
    participant = SimpleNamespace(rank=1, num_pages=64, page_size=16, guests=SimpleNamespace(num_pages=0))
    empty = SimpleNamespace(reqs=[])
    scheduled = {"running_batch": empty, "last_batch": None, "chunked_req": None, "waiting_queue": []} | scheduler
    ends: list[Any] = []
    metrics = SimpleNamespace(observe_end=ends.append, ends=ends)
    return SimpleNamespace(
        participant=participant,
        pool=pool,
        scheduler=SimpleNamespace(**scheduled),
        queues=Queues(),
        request_log=RequestLog(),
        host_clock=HostClock(),
        metrics=metrics,
    )


def test_health_probes_are_not_in_the_report() -> None:
    """/health sends a request of one token whenever a server is idle: a thousand of them would push every client's out."""
    probe, client = Request("HEALTH_CHECK_0a1b"), Request("mine")
    runtime = make_runtime(running_batch=SimpleNamespace(reqs=[probe, client]), waiting_queue=[Request("HEALTH_CHECK_2")])
    assert [entry["rid"] for entry in report.build_report(runtime)["running"]] == ["mine"]
    report.close(runtime, Request("HEALTH_CHECK_0a1b", ended=True))
    report.close(runtime, Request("mine", ended=True))
    assert [entry["rid"] for entry in runtime.request_log] == ["mine"]
    assert len(runtime.metrics.ends) == 1


def test_a_probe_still_gets_its_answer() -> None:
    assert report.close(make_runtime(), Request("HEALTH_CHECK_0a1b", ended=True))["degree_end"] == 1


def test_long_ids_are_cut() -> None:
    runtime = make_runtime(running_batch=SimpleNamespace(reqs=[Request("y" * 50_000)]))
    report.close(runtime, Request("x" * 50_000, ended=True))
    told = report.build_report(runtime)
    assert [len(entry["rid"]) for entry in told["running"] + told["finished"]] == [LONGEST_ID] * 2


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


@pytest.mark.parametrize(("api_key", "admin_api_key", "header", "allowed"), ACCESS)
def test_the_report_is_an_administrators_call(
    api_key: str | None, admin_api_key: str | None, header: str | None, allowed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind SGLang's own middleware, as its HTTP server builds it."""
    from sglang.srt.utils.auth import add_api_key_middleware

    async def ask(_message: Any) -> list[Any]:
        return [SimpleNamespace(internal_state=report.build_report(make_runtime()))]

    manager = SimpleNamespace(auto_create_handle_loop=lambda: None, get_internal_state_communicator=ask)
    app = FastAPI()
    stand_in = SimpleNamespace(app=app, get_global_state=lambda: SimpleNamespace(tokenizer_manager=manager))
    monkeypatch.setitem(sys.modules, "sglang.srt.entrypoints.http_server", stand_in)
    result.add_report_route()
    if api_key or admin_api_key:
        add_api_key_middleware(app, api_key=api_key, admin_api_key=admin_api_key)
    answer = TestClient(app).get(ROUTE, headers={"Authorization": header} if header else {})
    assert answer.status_code == (200 if allowed else 401)
    if allowed:
        assert [instance["rank"] for instance in answer.json()["instances"]] == [1]
