"""Servers that are measured have frozen their garbage collectors."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from testing.client import RequestFailed
from testing.gpu.servers import READY, GpuServer, wait_ready
from testing.ports import find_free_port

ASKED = [("POST", "/freeze_gc")]


@contextmanager
def listening(port: int, status: int, delay_s: float = 0.0) -> Iterator[list[tuple[str, str]]]:
    """A server that listens after a while and gives everybody this status; what it was asked."""
    asked: list[tuple[str, str]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append((self.command, self.path))
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    def listen() -> None:
        time.sleep(delay_s)
        with HTTPServer(("127.0.0.1", port), Handler) as server:
            servers.append(server)
            server.serve_forever(poll_interval=0.02)

    servers: list[HTTPServer] = []
    thread = threading.Thread(target=listen)
    thread.start()
    try:
        yield asked
    finally:
        while not servers:
            time.sleep(0.02)
        servers[0].shutdown()
        thread.join()


@pytest.fixture
def server(tmp_path: Path) -> GpuServer:
    """Alive, and says that it is ready."""
    log = tmp_path / "server.log"
    log.write_text(f"The server is {READY}")
    process: Any = SimpleNamespace(poll=lambda: None)
    return GpuServer("ours", tmp_path, 2, 1024, True, port=find_free_port(), process=process, log_path=log)


def test_a_server_that_says_it_is_ready_is_asked_as_soon_as_it_listens(server: GpuServer) -> None:
    with listening(server.port, 200, delay_s=0.6) as asked:
        wait_ready([server], time.monotonic() + 30)
        assert server.ready_s is not None and server.ready_s > 0.5
        wait_ready([server], time.monotonic() + 30)
    assert asked == ASKED, "once"


def test_nobody_is_asked_before_that(server: GpuServer) -> None:
    server.log_path.write_text("loading")
    with listening(server.port, 200) as asked:
        wait_ready([server], time.monotonic() + 0.3)
    assert asked == [] and server.ready_s is None


def test_a_server_that_refuses_is_not_measured(server: GpuServer) -> None:
    with listening(server.port, 401) as asked, pytest.raises(RequestFailed, match="HTTP 401"):
        wait_ready([server], time.monotonic() + 30)
    assert asked == ASKED and server.ready_s is None
