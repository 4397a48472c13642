"""What a server says of a client's run, from its metrics and its report: the difference of two readings."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from scripts.client_runs.clients import CLIENTS
from scripts.client_runs.served import SHARDS, Books

METRICS = """# TYPE sglang:e2e_request_latency_seconds histogram
sglang:e2e_request_latency_seconds_count{{model_name="served"}} {requests}
sglang:e2e_request_latency_seconds_sum{{model_name="served"}} {whole}
sglang:time_to_first_token_seconds_sum{{model_name="served"}} {first}
sglang:generation_tokens_total{{model_name="served",priority=""}} {tokens}
sglang:generation_tokens_total{{model_name="served",priority="1"}} 1.0
"""


def server(requests: int, tokens: int, first: float, whole: float, degrees: list[int]) -> Any:
    text = METRICS.format(requests=requests, tokens=tokens, first=first, whole=whole)
    report = {"requests": [{"degree_end": degree} for degree in degrees]}
    return SimpleNamespace(metrics=lambda: text, json=lambda method, path: report)


def test_a_run_is_the_difference_of_two_readings() -> None:
    before = Books.of(server(3, 30, 1.0, 5.0, [1, 2, 2]))
    told = Books.of(server(5, 52, 1.5, 6.5, [1, 2, 2, SHARDS, 1])).since(before)
    assert told["token_ms"] == pytest.approx(1000 * (1.5 - 0.5) / 20)
    assert (told["sent"], told["sharded"], told["output_tokens"]) == (2, 1, 11)


def test_a_client_that_sent_nothing_has_no_time_per_token() -> None:
    books = Books.of(server(3, 30, 1.0, 5.0, []))
    assert books.since(books) == {"sent": 0, "sharded": 0, "output_tokens": None, "token_ms": None}


def test_every_client_names_the_figure_to_compare() -> None:
    assert {client.compare for client in CLIENTS} == {"tpot_ms", "itl_ms"}
    assert all(getattr(client, client.compare.removesuffix("_ms")) != "(none)" for client in CLIENTS)
