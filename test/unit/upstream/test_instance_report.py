"""The report of an instance and who may read it: no health probes, ids of bounded length, SGLang's own rule for administrators' calls."""

from __future__ import annotations

import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from sglang_dcp.observe.load import MOST_REQUESTS
from sglang_dcp.observe.request_log import LONGEST_ID, RequestLog
from sglang_dcp.policy.split_limits import Layout, SplitLimits
from sglang_dcp.upstream.observe import report
from sglang_dcp.upstream.observe.host_clock import HostClock
from sglang_dcp.upstream.step.queues import Queues


class Managed:
    start_degree = 1

    def __init__(self, shards: dict[int, int]) -> None:
        self._shards = shards

    def active_shards(self, _num_tokens: int, _page_size: int) -> Iterator[int]:
        return iter(self._shards)

    def tokens_per_shard(self, _num_tokens: int, _page_size: int) -> dict[int, int]:
        return self._shards


class Request:
    """As much of SGLang's Req as a report reads. shards: of a managed request, tokens of each instance."""

    def __init__(self, rid: str, ended: bool = False, prompt: int = 20, shards: dict[int, int] | None = None) -> None:
        self.rid, self.dyncp = rid, None if shards is None else Managed(shards)
        self.origin_input_ids, self.output_ids = [1] * prompt, [2] * 3
        self.finished_reason = SimpleNamespace(to_json=lambda: {"type": "length"})
        self._ended = ended

    def finished(self) -> bool:
        return self._ended


def make_runtime(**scheduler: Any) -> Any:
    pool = SimpleNamespace(num_givable_pages=lambda: 60)
    guests, limits = SimpleNamespace(num_pages=0, num_retained=0), SplitLimits(64, 2, 64, Layout(4, 2))
    participant = SimpleNamespace(rank=1, num_pages=64, page_size=16, guests=guests, limits=limits)
    participant.retention = SimpleNamespace(num_pages_here=4)
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


def test_requests_of_one_id_are_all_told_and_each_once() -> None:
    """Two tokenizer workers may give two requests one id; a request may be in two of SGLang's batches."""
    one, other = Request("mine"), Request("mine", prompt=30)
    runtime = make_runtime(running_batch=SimpleNamespace(reqs=[one, other]), last_batch=SimpleNamespace(reqs=[one]))
    assert [entry["prompt_tokens"] for entry in report.build_report(runtime)["running"]] == [20, 30]
    assert report.build_load(runtime)["home_requests"] == 2


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


def test_a_load_has_degrees_and_the_longest_of_what_the_report_lists() -> None:
    running = [Request("a", prompt=30), Request("b", prompt=200, shards={1: 112, 0: 90}), Request("HEALTH_CHECK_1")]
    parked = [Request("c", prompt=100, shards={1: 102})]
    queue = [Request("d", prompt=300, shards={}), Request("e")]
    runtime = make_runtime(running_batch=SimpleNamespace(reqs=running), waiting_queue=queue)
    runtime.queues.parked, runtime.queues.waiting = parked, {7: queue[0]}
    load, whole = report.build_load(runtime), report.build_report(runtime)
    assert load["degrees"] == {"1": 2, "2": 1}, "of those that hold KV"
    assert load["home_requests"] == len(whole["running"]) == 5
    assert [entry["rid"] for entry in load["longest"]] == ["d", "b", "c", "a"]
    told = {entry["rid"]: entry | {"time": 0} for entry in whole["running"]}
    assert [entry | {"time": 0} for entry in load["longest"]] == [told[rid] for rid in "dbca"]
    assert load["queued"] == 2
    json.dumps(load)


def test_a_load_is_small_however_much_there_is() -> None:
    """It is asked for every second: neither what ended nor the queue is in it, and few requests are described."""
    runtime = make_runtime(running_batch=SimpleNamespace(reqs=[Request(f"{n}", prompt=20 + n) for n in range(400)]))
    for number in range(1000):
        report.close(runtime, Request(f"ended-{number}", ended=True))

    class Queue(list[Any]):
        def __iter__(self) -> Iterator[Any]:
            raise AssertionError("the queue is walked")

    runtime.scheduler.waiting_queue = Queue([Request("q")] * 5000)
    load = report.build_load(runtime)
    assert load["home_requests"] == 5400
    assert [entry["prompt_tokens"] for entry in load["longest"]] == [419 - n for n in range(MOST_REQUESTS)]
    assert "finished" not in load
