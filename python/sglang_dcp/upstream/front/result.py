"""What the main process tells about requests: meta_info.dyncp in an answer, and the route that serves all instances' reports."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import Depends

from sglang_dcp.observe.report_client import META_KEY, REPORT_RID, ROUTE
from sglang_dcp.observe.request_log import merge_requests
from sglang_dcp.upstream.front.access import check_key


def add_meta_info(
    original: Callable[..., Any], manager: Any, meta_info: dict[str, Any], state: Any, customized_info: Any, index: int, finish_reason: Any
) -> None:
    """AROUND TokenizerManager.update_request_meta_info: it would string our values together token by token."""
    values = customized_info.get(META_KEY)
    if values is None:
        return original(manager, meta_info, state, customized_info, index, finish_reason)
    if values[index]:
        meta_info[META_KEY] = values[index][-1]
    others = {key: value for key, value in customized_info.items() if key != META_KEY}
    return original(manager, meta_info, state, others, index, finish_reason)


def add_report_route() -> None:
    """Registers GET /dyncp/requests with SGLang's HTTP server: {"instances": [...], "requests": [...]}.

    It shows the requests of everybody, so it is an administrator's call, as SGLang's own are: --admin-api-key opens it where there is
    one, else --api-key, else nothing is asked for.
    """
    from sglang.srt.entrypoints.http_server import app
    from sglang.srt.utils.auth import AuthLevel, auth_level

    app.add_api_route(ROUTE, auth_level(AuthLevel.ADMIN_OPTIONAL)(serve_report), methods=["GET"], dependencies=[Depends(check_key)])


async def serve_report(rid: str | None = None) -> dict[str, Any]:
    """The body of GET /dyncp/requests. rid: only the requests of this id."""
    reports = sorted(await ask_instances(REPORT_RID), key=lambda report: report["rank"])
    instances = [
        {key: value for key, value in report.items() if key not in ("running", "finished")} | {"home_requests": len(report["running"])}
        for report in reports
    ]
    return {"instances": instances, "requests": merge_requests(reports, rid)}


async def ask_instances(question: str) -> list[dict[str, Any]]:
    """Every instance's answer to REPORT_RID or LOAD_RID."""
    from sglang.srt.entrypoints.http_server import get_global_state
    from sglang.srt.managers.io_struct import GetInternalStateReq

    manager = get_global_state().tokenizer_manager
    manager.auto_create_handle_loop()
    answers = await manager.get_internal_state_communicator(GetInternalStateReq(rid=question))
    return [answer.internal_state for answer in answers]
