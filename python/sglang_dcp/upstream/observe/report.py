"""What a scheduler process tells about requests: meta_info.dyncp of those that end, and the report of this instance."""

from __future__ import annotations

import heapq
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from sglang_dcp.observe.load import MOST_REQUESTS
from sglang_dcp.observe.report_client import LOAD_RID, META_KEY, REPORT_RID
from sglang_dcp.observe.request_log import short_id
from sglang_dcp.upstream.step.attached import after, around, current
from sglang_dcp.upstream.step.managed import is_managed
from sglang_dcp.upstream.step.queued import with_pages, without_pages
from sglang_dcp.upstream.step.runtime import Runtime


def describe(runtime: Runtime, req: Any) -> dict[str, Any]:
    """meta_info.dyncp of a request."""
    participant, num_tokens = runtime.participant, num_stored_tokens(req)
    if is_managed(req):
        tokens = req.dyncp.tokens_per_shard(num_tokens, participant.page_size)
        held = [{"rank": rank, "tokens": count} for rank, count in tokens.items()]
        return {"home": participant.rank, "shards": held, "degree_start": req.dyncp.start_degree, "degree_end": len(tokens)}
    shards = [{"rank": participant.rank, "tokens": num_tokens}]
    return {"home": participant.rank, "shards": shards, "degree_start": 1, "degree_end": 1}


def num_stored_tokens(req: Any) -> int:
    """Tokens of a request whose K/V is kept when it runs: its last one is never stored, so one less than the sequence has."""
    return len(req.origin_input_ids) + max(0, len(req.output_ids) - 1)


def make_streamer_class(stock: type) -> type:
    """A class of SGLang's whose outputs carry, for every request that ends, where it lived."""

    class DynCpOutputStreamer(stock):
        has_additional_customized_info = True

        def build_additional_customized_info(self, reqs: list[Any]) -> dict[str, list[Any]]:
            runtime = current()
            if runtime is None or not any(req.finished() for req in reqs):
                return {}
            return {META_KEY: [[close(runtime, req)] if req.finished() else [] for req in reqs]}

    return DynCpOutputStreamer


def get_streamer_class(result: type, scheduler: Any) -> type:
    """AFTER Scheduler.get_output_streamer_class."""
    return make_streamer_class(result)


def close(runtime: Runtime, req: Any) -> dict[str, Any]:
    """The request's output ends with this step: notes it, and returns meta_info.dyncp. Its pages may have been freed a moment ago."""
    where = describe(runtime, req)
    reason = req.finished_reason.to_json()
    note_end(runtime, req, where, "aborted" if reason["type"] == "abort" else "finished", reason["type"])
    return where


@after
def after_abort_output(runtime: Runtime, result: None, scheduler: Any, abort_req: Any, req: Any) -> None:
    """AFTER Scheduler.send_abort_output: requests that end outside the output stream (in the queue, or sitting out)."""
    note_end(runtime, req, describe(runtime, req), "aborted", "abort")


def note_end(runtime: Runtime, req: Any, where: dict[str, Any], state: str, reason: str) -> None:
    """Enters an end into the report and the metrics. SGLang keeps its own health probes out of its metrics; so do we."""
    if is_probe(req):
        return
    runtime.request_log.add(_entry(req, where, state) | {"finish_reason": reason})
    if runtime.metrics is not None:
        runtime.metrics.observe_end(where)


def is_probe(req: Any) -> bool:
    """Whether SGLang's /health sent the request, and no client."""
    from sglang.srt.constants import HEALTH_CHECK_RID_PREFIX

    return str(req.rid).startswith(HEALTH_CHECK_RID_PREFIX)


def _entry(req: Any, where: dict[str, Any], state: str) -> dict[str, Any]:
    lengths = {"prompt_tokens": len(req.origin_input_ids), "output_tokens": len(req.output_ids)}
    return {"rid": short_id(req.rid), "state": state, **lengths, "time": time.time(), **where}


@around
def answer_report(runtime: Runtime, original: Callable[..., Any], controller: Any, recv_req: Any) -> Any:
    """AROUND SchedulerInternalStateController.get_internal_state: this instance's report or load when that is what is asked for."""
    build = {REPORT_RID: build_report, LOAD_RID: build_load}.get(recv_req.rid)
    if build is None:
        return original(controller, recv_req)
    from sglang.srt.managers.io_struct import GetInternalStateReqOutput

    return GetInternalStateReqOutput(internal_state=build(runtime))


def build_report(runtime: Runtime) -> dict[str, Any]:
    """Load and requests of this instance. Built only when somebody asks, in the scheduler's loop: its cost does not grow with lengths."""
    waiting = ((req, "waiting") for req in without_pages(runtime.scheduler))
    running = [_entry(req, describe(runtime, req), state) for req, state in _distinct([*_holders(runtime), *waiting])]
    return _figures(runtime) | {"running": running, "host_us": runtime.host_clock.summary(), "finished": list(runtime.request_log)}


def build_load(runtime: Runtime) -> dict[str, Any]:
    """The same without those that ended and without the queue, which may be long: somebody asks every second. Of the queue, requests that
    wait for a reservation are looked at."""
    holding = _distinct(_holders(runtime))
    waiting = ((req, "waiting") for req in runtime.queues.waiting.values())
    chosen = heapq.nlargest(MOST_REQUESTS, _distinct([*holding, *waiting]), key=lambda pair: num_stored_tokens(pair[0]))
    return _figures(runtime) | {
        "home_requests": len(holding) + len(without_pages(runtime.scheduler)),
        "degrees": {str(degree): number for degree, number in Counter(degree_of(runtime, req) for req, _ in holding).items()},
        "longest": [_entry(req, describe(runtime, req), state) for req, state in chosen],
    }


def degree_of(runtime: Runtime, req: Any) -> int:
    """Shards of a request; describe() tells the same with their tokens."""
    if not is_managed(req):
        return 1
    return sum(1 for _ in req.dyncp.active_shards(num_stored_tokens(req), runtime.participant.page_size))


def _figures(runtime: Runtime) -> dict[str, Any]:
    participant, layout = runtime.participant, runtime.participant.limits.layout
    page_size = participant.page_size
    return {
        "rank": participant.rank,
        **({"node": layout.node_of(participant.rank)} if layout.node_size < layout.num_instances else {}),
        "pool_tokens": participant.num_pages * page_size,
        "kv_tokens": (participant.num_pages - runtime.pool.num_givable_pages()) * page_size,
        "guest_tokens": (participant.guests.num_pages - participant.guests.num_retained) * page_size,
        "retained_tokens": participant.retention.num_pages_here * page_size,
        "queued": len(without_pages(runtime.scheduler)),
    }


def _holders(runtime: Runtime) -> Iterator[tuple[Any, str]]:
    """Requests that left the queue, with their states; some of them twice."""
    scheduler = runtime.scheduler
    groups = [
        ("sits out", runtime.queues.parked),
        ("running", scheduler.running_batch.reqs),
        ("running", scheduler.last_batch.reqs if scheduler.last_batch else ()),
        ("prefill", [scheduler.chunked_req] if scheduler.chunked_req is not None else ()),
        ("arriving", with_pages(scheduler)),
    ]
    return ((req, state) for state, reqs in groups for req in reqs)


def _distinct(groups: Iterable[tuple[Any, str]]) -> list[tuple[Any, str]]:
    """Each client's request that has not ended once, in the first state that is told. Two may have one id."""
    found: dict[int, tuple[Any, str]] = {}
    for req, state in groups:
        if not req.finished() and not is_probe(req):
            found.setdefault(id(req), (req, state))
    return list(found.values())
