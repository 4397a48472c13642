"""A server that has given everything back."""

from __future__ import annotations

from testing.recall import recall_prompt
from testing.server import Server
from testing.waiting import wait_until


def assert_drained(server: Server, limit_s: float = 60.0) -> None:
    """Idle again, cache flushed: every instance's pool is whole, and the server answers."""
    wait_until(server.client.flush_cache, "the server never fell idle", limit_s)
    prompt = recall_prompt(100, 0.5, 99)
    assert server.client.generate(prompt.text).text == prompt.answer
    assert server.is_alive
