"""What a scheduler process tells about requests: meta_info.dyncp of those that end, and the report of this instance."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from sglang_dcp.observe.report_client import META_KEY, REPORT_RID
from sglang_dcp.observe.request_log import short_id
from sglang_dcp.upstream.step.binding import Binding, current
from sglang_dcp.upstream.step.instance import is_managed


def describe(binding: Binding, req: Any) -> dict[str, Any]:
    """meta_info.dyncp of a request. Its last token is never stored, so the shards hold one token less than the sequence has."""
    instance = binding.instance
    num_tokens = len(req.origin_input_ids) + max(0, len(req.output_ids) - 1)
    if is_managed(req):
        return instance.describe(req.dyncp, num_tokens)
    shards = [{"rank": instance.rank, "tokens": num_tokens}]
    return {"home": instance.rank, "shards": shards, "degree_start": 1, "degree_end": 1}


def make_streamer_class(stock: type) -> type:
    """A class of SGLang's whose outputs carry, for every request that ends, where it lived."""

    class DynCpOutputStreamer(stock):
        has_additional_customized_info = True

        def build_additional_customized_info(self, reqs: list[Any]) -> dict[str, list[Any]]:
            binding = current()
            if binding is None or not any(req.finished() for req in reqs):
                return {}
            return {META_KEY: [[close(binding, req)] if req.finished() else [] for req in reqs]}

    return DynCpOutputStreamer


def get_streamer_class(result: type, scheduler: Any) -> type:
    """AFTER Scheduler.get_output_streamer_class."""
    return make_streamer_class(result)


def close(binding: Binding, req: Any) -> dict[str, Any]:
    """The request's output ends with this step: notes it, and returns meta_info.dyncp. Its pages may have been freed a moment ago."""
    where = describe(binding, req)
    reason = req.finished_reason.to_json()
    note_end(binding, req, where, "aborted" if reason["type"] == "abort" else "finished", reason["type"])
    return where


def after_abort_output(result: None, scheduler: Any, abort_req: Any, req: Any) -> None:
    """AFTER Scheduler.send_abort_output: requests that end outside the output stream (in the queue, or sitting out)."""
    binding = current()
    if binding is not None:
        note_end(binding, req, describe(binding, req), "aborted", "abort")


def note_end(binding: Binding, req: Any, where: dict[str, Any], state: str, reason: str) -> None:
    """Enters an end into the report and the metrics. SGLang keeps its own health probes out of its metrics; so do we."""
    if is_probe(req):
        return
    binding.request_log.add(_entry(req, where, state) | {"finish_reason": reason})
    if binding.metrics is not None:
        binding.metrics.observe_end(where)


def is_probe(req: Any) -> bool:
    """Whether SGLang's /health sent the request, and no client."""
    from sglang.srt.constants import HEALTH_CHECK_RID_PREFIX

    return str(req.rid).startswith(HEALTH_CHECK_RID_PREFIX)


def _entry(req: Any, where: dict[str, Any], state: str) -> dict[str, Any]:
    lengths = {"prompt_tokens": len(req.origin_input_ids), "output_tokens": len(req.output_ids)}
    return {"rid": short_id(req.rid), "state": state, **lengths, "time": time.time(), **where}


def answer_report(original: Callable[..., Any], controller: Any, recv_req: Any) -> Any:
    """AROUND SchedulerInternalStateController.get_internal_state: this instance's report when that is what is asked for."""
    binding = current()
    if binding is None or recv_req.rid != REPORT_RID:
        return original(controller, recv_req)
    from sglang.srt.managers.io_struct import GetInternalStateReqOutput

    return GetInternalStateReqOutput(internal_state=build_report(binding))


def build_report(binding: Binding) -> dict[str, Any]:
    """Load and requests of this instance. Built only when somebody asks, in the scheduler's loop: its cost does not grow with lengths."""
    instance, scheduler = binding.instance, binding.scheduler
    page_size = instance.page_size
    return {
        "rank": instance.rank,
        "pool_tokens": instance.num_pages * page_size,
        "kv_tokens": (instance.num_pages - instance.pool.num_givable_pages()) * page_size,
        "guest_tokens": instance.guests.num_pages * page_size,
        "running": [_entry(req, describe(binding, req), state) for req, state in _live_requests(binding)],
        "queued": len(scheduler.waiting_queue),
        "host_us": binding.host_clock.summary(),
        "finished": list(binding.request_log),
    }


def _live_requests(binding: Binding) -> list[tuple[Any, str]]:
    scheduler = binding.scheduler
    found: dict[str, tuple[Any, str]] = {}
    groups = [
        ("sits out", binding.parked),
        ("running", scheduler.running_batch.reqs),
        ("running", scheduler.last_batch.reqs if scheduler.last_batch else ()),
        ("prefill", [scheduler.chunked_req] if scheduler.chunked_req is not None else ()),
        ("waiting", scheduler.waiting_queue),
    ]
    for state, reqs in groups:
        for req in reqs:
            if not req.finished() and not is_probe(req):
                found.setdefault(req.rid, (req, state))
    return list(found.values())
