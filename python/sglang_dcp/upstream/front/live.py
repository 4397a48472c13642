"""The live page and the load that it reads once a second, served by the main process."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import Depends, HTTPException
from fastapi.responses import HTMLResponse

from sglang_dcp.observe.live_page import live_page
from sglang_dcp.observe.load import merge_loads
from sglang_dcp.observe.report_client import LIVE_ROUTE, LOAD_RID, LOAD_ROUTE
from sglang_dcp.upstream.front.access import check_key
from sglang_dcp.upstream.front.result import ask_instances

KEPT_SECONDS = 0.5
"""A load is read again after this time: many readers cost the schedulers as much as one."""
ANSWER_LIMIT_SECONDS = 10.0


class SharedReading:
    """One reading for all who ask at the same time. `read` makes one; it is never cancelled, because SGLang would take answers that come
    later for those of the next question."""

    def __init__(self, read: Callable[[], Awaitable[Any]], clock: Callable[[], float] = time.monotonic) -> None:
        self._read, self._clock = read, clock
        self._task: asyncio.Task[Any] | None = None
        self._fresh_until = 0.0

    async def get(self) -> Any:
        """The reading. Raises TimeoutError after ANSWER_LIMIT_SECONDS; the next to ask waits for the same reading then."""
        if self._task is None or self._task.done() and self._clock() >= self._fresh_until:
            self._fresh_until = 0.0
            self._task = asyncio.create_task(self._make())
        return await asyncio.wait_for(asyncio.shield(self._task), ANSWER_LIMIT_SECONDS)

    async def _make(self) -> Any:
        reading = await self._read()
        self._fresh_until = self._clock() + KEPT_SECONDS
        return reading


def add_live_routes() -> None:
    """Registers GET /dyncp/live, the page, and GET /dyncp/load, its data: an administrator's call, as the report is."""
    from sglang.srt.entrypoints.http_server import app
    from sglang.srt.utils.auth import AuthLevel, auth_level

    app.add_api_route(LIVE_ROUTE, serve_page, methods=["GET"], response_class=HTMLResponse)
    endpoint = auth_level(AuthLevel.ADMIN_OPTIONAL)(make_load_endpoint(SharedReading(read_load)))
    app.add_api_route(LOAD_ROUTE, endpoint, methods=["GET"], dependencies=[Depends(check_key)])


async def serve_page() -> HTMLResponse:
    page = live_page()
    return HTMLResponse(page.html, headers=page.headers)


def make_load_endpoint(reading: SharedReading) -> Callable[[], Awaitable[dict[str, Any]]]:
    async def serve_load() -> dict[str, Any]:
        """{"instances": [...], "degrees": {...}, "longest": [...]}; HTTP 503 when the instances do not answer."""
        try:
            return dict(await reading.get())
        except TimeoutError:
            raise HTTPException(503, f"the instances gave no answer within {ANSWER_LIMIT_SECONDS:g} s") from None

    return serve_load


async def read_load() -> dict[str, Any]:
    return merge_loads(await ask_instances(LOAD_RID))


def open_page(original: Callable[..., Any], *, method: str, path: str, **rest: Any) -> Any:
    """AROUND auth.decide_request_auth: the page needs no key, because a browser cannot send one before it has the page. It holds no data;
    what it reads needs the key."""
    from sglang.srt.runtime_context import get_serving
    from sglang.srt.utils.auth import AuthDecision

    if method == "GET" and path.removeprefix(get_serving().fastapi_root_path or "") == LIVE_ROUTE:
        return AuthDecision(allowed=True)
    return original(method=method, path=path, **rest)
