"""What a request's client and an observer get to know: meta_info.dyncp, the report of an instance, and the route that serves it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from sglang_dcp.observe.report_client import ROUTE
from sglang_dcp.observe.request_log import merge_requests
from sglang_dcp.upstream.step.binding import Binding, current
from sglang_dcp.upstream.step.instance import is_managed

KEY = "dyncp"
REPORT_RID = "dyncp/report"
"""Marks the control request that asks for our report: SGLang's GetInternalStateReq has no other free field."""


# ---- scheduler process


def describe(binding: Binding, req: Any) -> dict[str, Any]:
    """meta_info.dyncp of a request. Its last token is never stored, so the shards hold one token less than the sequence has."""
    instance = binding.instance
    num_tokens = len(req.origin_input_ids) + max(0, len(req.output_ids) - 1)
    if is_managed(req):
        return instance.describe(req.dyncp, num_tokens)
    shards = [{"rank": instance.rank, "tokens": num_tokens}]
    return {"home": instance.rank, "shards": shards, "degree_start": 1, "degree_end": 1}


def make_streamer_class(stock: type) -> type:
    """AFTER Scheduler.get_output_streamer_class: every finished request's output carries where it lived."""

    class DynCpOutputStreamer(stock):
        has_additional_customized_info = True

        def build_additional_customized_info(self, reqs: list[Any]) -> dict[str, list[Any]]:
            binding = current()
            if binding is None or not any(req.finished() for req in reqs):
                return {}
            return {KEY: [[close(binding, req)] if req.finished() else [] for req in reqs]}

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
    binding.request_log.add(_entry(req, where, state) | {"finish_reason": reason})
    if binding.metrics is not None:
        binding.metrics.observe_end(where)


def _entry(req: Any, where: dict[str, Any], state: str) -> dict[str, Any]:
    lengths = {"prompt_tokens": len(req.origin_input_ids), "output_tokens": len(req.output_ids)}
    return {"rid": req.rid, "state": state, **lengths, "time": time.time(), **where}


def answer_report(original: Callable[..., Any], controller: Any, recv_req: Any) -> Any:
    """AROUND SchedulerInternalStateController.get_internal_state: this instance's report when that is what is asked for."""
    binding = current()
    if binding is None or recv_req.rid != REPORT_RID:
        return original(controller, recv_req)
    from sglang.srt.managers.io_struct import GetInternalStateReqOutput

    return GetInternalStateReqOutput(internal_state=build_report(binding))


def build_report(binding: Binding) -> dict[str, Any]:
    """Load and requests of this instance. Built only when somebody asks."""
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
            if not req.finished():
                found.setdefault(req.rid, (req, state))
    return list(found.values())


# ---- main process


def add_meta_info(
    original: Callable[..., Any], manager: Any, meta_info: dict[str, Any], state: Any, customized_info: Any, index: int, finish_reason: Any
) -> None:
    """AROUND TokenizerManager.update_request_meta_info: it would string our values together token by token."""
    values = customized_info.get(KEY)
    if values is None:
        return original(manager, meta_info, state, customized_info, index, finish_reason)
    if values[index]:
        meta_info[KEY] = values[index][-1]
    others = {key: value for key, value in customized_info.items() if key != KEY}
    return original(manager, meta_info, state, others, index, finish_reason)


def add_report_route() -> None:
    """Registers GET /dyncp/requests with SGLang's HTTP server: {"instances": [...], "requests": [...]}."""
    from sglang.srt.entrypoints.http_server import app

    app.add_api_route(ROUTE, _serve_report, methods=["GET"])


async def _serve_report(rid: str | None = None) -> dict[str, Any]:
    from sglang.srt.entrypoints.http_server import get_global_state
    from sglang.srt.managers.io_struct import GetInternalStateReq

    manager = get_global_state().tokenizer_manager
    manager.auto_create_handle_loop()
    answers = await manager.get_internal_state_communicator(GetInternalStateReq(rid=REPORT_RID))
    reports = sorted((answer.internal_state for answer in answers), key=lambda report: report["rank"])
    keys = ("rank", "pool_tokens", "kv_tokens", "guest_tokens", "queued", "host_us")
    instances = [{key: report[key] for key in keys} | {"home_requests": len(report["running"])} for report in reports]
    return {"instances": instances, "requests": merge_requests(reports, rid)}
