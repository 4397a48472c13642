"""Stands before every HTTP request: knows which answers are still open, and refuses new requests once the server is ending."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

WHILE_DRAINING = ("/abort_request",)
"""POST routes that stay open between SIGTERM and the last answer: they shorten the wait."""


class Gate:
    """State of this process's gate. open_answers: POST requests whose answer has not been handed over to the socket whole.

    draining: POST requests are refused, open ones go on. ending: every request is refused. Both are the reason that a client reads.
    """

    def __init__(self) -> None:
        self.open_answers = 0
        self.draining: str | None = None
        self.ending: str | None = None

    def refusal(self, method: str, path: str) -> str | None:
        """Why a request is refused, or None."""
        if self.ending is not None:
            return self.ending
        return self.draining if method == "POST" and path not in WHILE_DRAINING else None


GATE = Gate()


class GateMiddleware:
    """ASGI middleware in front of SGLang's application. It never touches the bytes of an answer."""

    def __init__(self, app: Application, gate: Gate = GATE) -> None:
        self._app = app
        self._gate = gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        reason = self._gate.refusal(scope["method"], scope["path"])
        if reason is not None:
            return await _refuse(send, reason)
        if scope["method"] != "POST":
            return await self._app(scope, receive, send)
        await self._count(scope, receive, send)

    async def _count(self, scope: Scope, receive: Receive, send: Send) -> None:
        """SGLang's background tasks run for seconds after an answer, inside the same call: the last byte ends it, not the return."""
        gate, is_open = self._gate, True
        gate.open_answers += 1

        def close() -> None:
            nonlocal is_open
            gate.open_answers -= is_open
            is_open = False

        async def send_and_note(message: MutableMapping[str, Any]) -> None:
            await send(message)
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                close()

        try:
            await self._app(scope, receive, send_and_note)
        finally:
            close()


async def _refuse(send: Send, reason: str) -> None:
    body = json.dumps({"error": {"message": reason, "type": "service_unavailable", "code": 503}}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": 503, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def add_gate() -> None:
    """Registers the gate with SGLang's HTTP server, before it starts."""
    from sglang.srt.entrypoints.http_server import app

    app.add_middleware(GateMiddleware)
