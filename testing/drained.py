"""A server that has given everything back."""

from __future__ import annotations

import time

from testing.recall import recall_prompt
from testing.server import Server


def assert_drained(server: Server, limit_s: float = 60.0) -> None:
    """Idle again, cache flushed: every instance's pool is whole, and the server answers."""
    deadline = time.monotonic() + limit_s
    while not server.client.flush_cache():
        assert time.monotonic() < deadline, "the server never fell idle"
        time.sleep(0.5)
    prompt = recall_prompt(100, 0.5, 99)
    assert server.client.generate(prompt.text).text == prompt.answer
    assert server.is_alive
