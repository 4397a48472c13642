"""Eight requests of every kind that a server of two instances has open at once, and how each of them ended.

Streams and whole answers, OpenAI's routes and SGLang's, a batch, sharded ones, one that waits for pages, one that sits out.
"""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from testing.client import Client, RequestFailed
from testing.server import ServerConfig

ROOT = Path(__file__).resolve().parents[2]

POOL_TOKENS = 512
FOREVER = {"ignore_eos": True}
SHARDED = FOREVER | {"custom_params": {"dyncp": {"degree": 2}}}
MIXED = ("running", "waiting", "sits out", "sharded")
UNDERWAY_SECONDS = 180.0
ANSWER_SECONDS = 240.0


def mixed_server(*flags: str, environment: tuple[tuple[str, str], ...] = ()) -> ServerConfig:
    """Two instances whose pools the eight requests outgrow."""
    return ServerConfig(
        "qwen3moe", 2, pool_tokens=POOL_TOKENS, page_size=16, chunk_tokens=128, dyncp=True, flags=flags, environment=environment
    )


@dataclass(frozen=True)
class Outcome:
    """How a request ended for its client. status: of HTTP or of the error event; 200 for a whole answer, None for a cut connection.

    at: time.monotonic() of the last byte.
    """

    name: str
    status: int | None
    message: str
    at: float


@dataclass
class MixedLoad:
    """The eight requests under way; `outcomes` waits for their ends."""

    client: Client
    futures: list[Future[Outcome]]
    executor: ThreadPoolExecutor

    def wait_until_mixed(self, wanted: tuple[str, ...] = MIXED) -> dict[str, int]:
        """Returns the number of requests by state once there is one of each wanted state at the same time."""
        deadline = time.monotonic() + UNDERWAY_SECONDS
        counts: dict[str, int] = {}
        while time.monotonic() < deadline:
            requests = [r for r in self.client.json("GET", "/dyncp/requests")["requests"] if r["state"] not in ("finished", "aborted")]
            counts = {state: sum(r["state"] == state for r in requests) for state in ("running", "waiting", "sits out")}
            counts["sharded"] = sum(len(r["shards"]) > 1 for r in requests)
            ended = [future.result() for future in self.futures if future.done()]
            if ended:
                raise RuntimeError(f"ended before the mix was complete: {ended}")
            if all(counts[state] for state in wanted):
                return counts
            time.sleep(0.1)
        raise RuntimeError(f"no mix of requests within {UNDERWAY_SECONDS:.0f} s, last {counts}")

    def outcomes(self) -> list[Outcome]:
        with self.executor:
            return [future.result(timeout=ANSWER_SECONDS) for future in self.futures]


def send_mixed(client: Client) -> MixedLoad:
    """Sends the eight; returns at once."""
    kinds: list[tuple[str, Callable[[], None]]] = [
        ("sharded stream", lambda: _read_stream(client, 120, 800, SHARDED)),
        ("sharded stream, later", lambda: _read_stream(client, 121, 780, SHARDED)),
        ("sharded answer", lambda: _generate(client, 122, 760, SHARDED)),
        ("OpenAI stream", lambda: _complete(client, stream=True)),
        ("OpenAI answer", lambda: _complete(client, stream=False)),
        ("batch", lambda: _batch(client)),
        ("long answer that waits", lambda: _generate(client, 840, 60, SHARDED)),
        ("long stream that waits", lambda: _read_stream(client, 841, 60, SHARDED)),
    ]
    return _send(client, kinds)


def send_one(client: Client) -> MixedLoad:
    """Sends a sharded one that ends by itself in seconds; returns at once."""
    return _send(client, [("sharded answer", lambda: _generate(client, 120, 200, SHARDED))])


def _send(client: Client, kinds: list[tuple[str, Callable[[], None]]]) -> MixedLoad:
    executor = ThreadPoolExecutor(len(kinds))
    return MixedLoad(client, [executor.submit(_run, name, send) for name, send in kinds], executor)


def _run(name: str, send: Callable[[], None]) -> Outcome:
    status: int | None
    try:
        send()
        status, message = 200, ""
    except RequestFailed as error:
        status, message = error.status, error.message
    except (OSError, http.client.HTTPException, json.JSONDecodeError) as error:
        status, message = None, repr(error)
    return Outcome(name, status, message, time.monotonic())


def _ids(length: int) -> list[int]:
    return [1 + (7 * i + length) % 90 for i in range(length)]


def _generate(client: Client, length: int, count: int, sampling: dict[str, object]) -> None:
    client.generate(_ids(length), max_new_tokens=count, sampling=sampling)


def _batch(client: Client) -> None:
    body = {"input_ids": [_ids(40), _ids(41)], "sampling_params": {"temperature": 0, "max_new_tokens": 350} | FOREVER}
    client.json("POST", "/generate", body)


def _complete(client: Client, *, stream: bool) -> None:
    text = "".join(chr(97 + i % 26) for i in range(60))
    if not stream:
        client.complete(text, max_tokens=380, ignore_eos=True)
        return
    with client.complete_stream(text, max_tokens=380, ignore_eos=True) as events:
        for _ in events.events():
            continue


def _read_stream(client: Client, length: int, count: int, sampling: dict[str, object]) -> None:
    with client.stream(_ids(length), max_new_tokens=count, sampling=sampling) as events:
        for event in events.events():
            reason = event["meta_info"].get("finish_reason") or {}
            if reason.get("type") == "abort":
                raise RequestFailed(int(reason.get("status_code") or 0), str(reason.get("message")))
