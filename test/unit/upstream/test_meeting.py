"""Prefill servers that do not fit: SGLang's own checks, in its own queue of a decode server, and who hears of it."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.disaggregation.base import KVPoll
from sglang.srt.disaggregation.common import conn
from sglang.srt.disaggregation.common.conn import CommonKVManager, CommonKVReceiver, PrefillServerInfo
from sglang.srt.disaggregation.decode import DecodePreallocQueue

from sglang_dcp.upstream.disaggregation.meeting import meet_prefill_servers
from sglang_dcp.upstream.step import attached

FITS = PrefillServerInfo(1, 1, 1, 1, 16, "torch.float32", True)
GOOD, BAD = "10.0.0.1:8998", "10.0.0.2:8998"


class Manager(CommonKVManager):
    """SGLang's, as far as it judges a prefill server and keeps the state of requests."""

    def __init__(self, servers: dict[str, PrefillServerInfo]) -> None:
        self.servers, self.prefill_info_table = servers, {}
        self.kv_args = SimpleNamespace(page_size=16, engine_rank=0, state_types=[])
        self.kv_cache_dtype_str, self.kv_layout, self.dsv41_spec_layout = "torch.float32", None, None
        self.attn_tp_size = self.attn_cp_size = self.dcp_size = self.pp_size = 1
        self.attn_cp_rank = self.pp_rank = 0
        self.is_mla_backend, self.is_hybrid_mla_backend, self.enable_all_cp_ranks_for_transfer = False, False, False
        self.defer_decode_allocation, self.deferred_bootstrap = False, None
        self.addr_to_rooms_tracker, self.prefill_response_tracker = defaultdict(set), {}
        self.request_status, self.failure_records, self.failures = {}, {}, []

    def update_status(self, room: int, status: KVPoll) -> None:
        self.request_status[room] = status

    def record_failure(self, room: int, reason: str) -> None:
        self.failure_records[room] = reason


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Any:
    monkeypatch.setattr(attached, "_runtime", SimpleNamespace())
    manager = Manager({GOOD: FITS, BAD: dataclasses.replace(FITS, **request.param)})

    def get(url: str, timeout: int) -> Any:
        record = manager.servers[url.split("/")[2]]
        return SimpleNamespace(status_code=200, json=lambda: dataclasses.asdict(record))

    monkeypatch.setattr(conn.requests, "get", get)
    queue = DecodePreallocQueue.__new__(DecodePreallocQueue)
    queue.kv_manager = manager
    queue._ensure_last_attempt_time, queue._ensure_retry_count = {}, {}
    queue._max_ensure_retries, queue._ensure_retry_interval = 15, 1.0
    return queue


def ask(queue: Any, **rooms: int) -> tuple[dict[str, list[Any]], list[Any], dict[str, Any]]:
    receivers = {name: CommonKVReceiver(queue.kv_manager, {"good": GOOD, "bad": BAD}[name], room) for name, room in rooms.items()}
    waiting = {receiver.bootstrap_addr: [SimpleNamespace(kv_receiver=receiver)] for receiver in receivers.values()}
    return (*meet_prefill_servers(DecodePreallocQueue._ensure_prefill_info, queue, waiting), receivers)


@pytest.mark.parametrize(
    ("queue", "words"),
    [
        ({"page_size": 1}, "Both servers must use the same --page-size value"),
        ({"kv_cache_dtype": "torch.bfloat16"}, "Both servers must use the same --kv-cache-dtype value"),
    ],
    indirect=["queue"],
)
def test_its_requests_alone_are_refused_with_what_sglang_says(queue: Any, words: str) -> None:
    ready, later, receivers = ask(queue, bad=1, good=2)
    assert list(ready) == [GOOD] and later == []
    assert receivers["bad"].conclude_state == KVPoll.Failed and receivers["good"].conclude_state is None
    assert queue.kv_manager.request_status == {1: KVPoll.Failed, 2: KVPoll.Bootstrapping}
    assert BAD in queue.kv_manager.failure_records[1] and words in queue.kv_manager.failure_records[1]


@pytest.mark.parametrize("queue", [{"page_size": 1}], indirect=True)
def test_one_that_was_started_anew_is_met(queue: Any) -> None:
    ask(queue, bad=1)
    queue.kv_manager.servers[BAD] = FITS
    ready, later, _ = ask(queue, bad=2)
    assert list(ready) == [BAD] and later == []


@pytest.mark.parametrize("queue", [{"page_size": 1}], indirect=True)
def test_a_request_that_has_ended_is_left_alone(queue: Any) -> None:
    gone = {BAD: [SimpleNamespace(kv_receiver=None)]}
    assert meet_prefill_servers(DecodePreallocQueue._ensure_prefill_info, queue, gone) == ({}, [])
