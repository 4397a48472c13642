"""A server that has given everything back."""

from __future__ import annotations

from testing.client import Client
from testing.live_load import loads
from testing.recall import recall_prompt
from testing.server import Server
from testing.waiting import wait_until


def flush(client: Client, limit_s: float = 60.0) -> None:
    """Nothing is retained any more. SGLang refuses while somebody runs, and it answers a request before its batch has let go of it."""
    wait_until(client.flush_cache, "the server never fell idle", limit_s)


def assert_all_free(client: Client, num_instances: int, limit_s: float = 60.0) -> None:
    """Idle again, cache flushed: every page is back, on every instance. Asks for nothing."""
    flush(client, limit_s)
    told = [(load["kv_tokens"], load["guest_tokens"], load["queued"]) for load in loads(client)]
    assert told == [(0, 0, 0)] * num_instances


def assert_drained(server: Server, limit_s: float = 60.0) -> None:
    """Idle again, cache flushed: every instance's pool is whole, and the server answers."""
    flush(server.client, limit_s)
    prompt = recall_prompt(100, 0.5, 99)
    assert server.client.generate(prompt.text).text == prompt.answer
    assert server.is_alive
