"""An OpenAI server that answers by the clock: the truth that benchmark clients are held against."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from typing import Any


@dataclass
class Paced:
    """First token after `first_s`, then `tokens_per_chunk` tokens every `tokens_per_chunk * token_s`. A byte is a token."""

    first_s: float
    token_s: float
    tokens_per_chunk: int
    model: str
    served: int = 0
    lock: Lock = field(default_factory=Lock)

    def start(self) -> ThreadingHTTPServer:
        """A running server on a free port; `shutdown` and `server_close` end it."""
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"paced": self}))
        server.daemon_threads = True
        Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return server


class _Handler(BaseHTTPRequestHandler):
    paced: Paced
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Silent."""

    def do_GET(self) -> None:
        if self.path.rstrip("/").endswith("/models"):
            self._json({"object": "list", "data": [{"id": self.paced.model, "object": "model", "created": 0, "owned_by": "paced"}]})
        elif self.path.startswith("/health"):
            self._json({"status": "ok"})
        else:
            self.send_error(404)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        is_chat = "chat" in self.path
        count = int(body.get("max_completion_tokens") or body.get("max_tokens") or 16)
        prompt = json.dumps(body.get("messages") or body.get("prompt"))
        usage = {"prompt_tokens": len(prompt), "completion_tokens": count, "total_tokens": len(prompt) + count}
        with self.paced.lock:
            self.paced.served += 1
        if not body.get("stream"):
            time.sleep(self.paced.first_s + (count - 1) * self.paced.token_s)
            self._json(self._event(is_chat, "a" * count, "length") | {"usage": usage})
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        begin, sent = time.monotonic(), 0
        while sent < count:
            step = 1 if sent == 0 else min(self.paced.tokens_per_chunk, count - sent)
            sent += step
            self._wait(begin + self.paced.first_s + (sent - 1) * self.paced.token_s)
            self._send(self._event(is_chat, "a" * step, "length" if sent == count else None, delta=True))
        if (body.get("stream_options") or {}).get("include_usage"):
            self._send(self._event(is_chat, None, None, delta=True) | {"usage": usage})
        self.wfile.write(b"data: [DONE]\n\n")
        self.close_connection = True

    def _event(self, is_chat: bool, text: str | None, finish: str | None, *, delta: bool = False) -> dict[str, Any]:
        kind = "chat.completion" + (".chunk" if delta else "") if is_chat else "text_completion"
        event = {"id": "paced", "object": kind, "created": 0, "model": self.paced.model, "choices": []}
        if text is not None:
            content = {"delta" if delta else "message": {"role": "assistant", "content": text}} if is_chat else {"text": text}
            event["choices"] = [{"index": 0, "finish_reason": finish, "logprobs": None} | content]
        return event

    def _send(self, event: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
        self.wfile.flush()

    def _wait(self, moment: float) -> None:
        time.sleep(max(0.0, moment - time.monotonic()))

    def _json(self, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
