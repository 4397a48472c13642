"""The server that benchmark clients are held against keeps its own word: tokens, chunks, usage and pace."""

from __future__ import annotations

from collections.abc import Iterator
from time import monotonic

import pytest

from scripts.client_runs.paced import Paced
from testing.client import Client


@pytest.fixture
def paced() -> Iterator[tuple[Paced, Client]]:
    paced = Paced(first_s=0.05, token_s=0.01, tokens_per_chunk=4, model="paced")
    server = paced.start()
    yield paced, Client(server.server_address[1], timeout_s=20)
    server.shutdown()
    server.server_close()


def test_chunks_and_usage(paced: tuple[Paced, Client]) -> None:
    state, client = paced
    begin = monotonic()
    with client.complete_stream("hello", max_tokens=10, stream_options={"include_usage": True}) as stream:
        *chunks, last = list(stream.events())
    assert [len(chunk["choices"][0]["text"]) for chunk in chunks] == [1, 4, 4, 1]
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert last["usage"]["completion_tokens"] == 10 and state.served == 1
    assert monotonic() - begin >= 0.05 + 9 * 0.01, "never early"


def test_chat_without_a_stream(paced: tuple[Paced, Client]) -> None:
    _, client = paced
    reply = client.chat("hello", max_tokens=3)
    assert len(reply["choices"][0]["message"]["content"]) == 3 and reply["usage"]["completion_tokens"] == 3
    assert client.json("GET", "/v1/models")["data"][0]["id"] == "paced"
    assert client.request("GET", "/nothing")[0] == 404
