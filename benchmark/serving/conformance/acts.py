"""Requests that are cut: by a client that goes, by an abort, by a pause. What an act returns is compared."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from benchmark.serving.conformance.case import Case
from benchmark.serving.conformance.native import IDS, LONG_IDS
from testing.client import Client, RequestFailed, Stream

IDLE_LIMIT_S = 60.0
ENDLESS = {"ignore_eos": True}


def act_cases() -> list[Case]:
    acts: dict[str, Callable[[Client], Any]] = {
        "a client goes": disconnect,
        "a client goes, long prompt": disconnect_long,
        "abort by id": abort_by_id,
        "abort by the beginning of an id": abort_by_prefix,
        "abort all": abort_all,
        "pause in place": pause_in_place,
        "pause by abort": pause_by_abort,
        "held back by a pause": held_back,
        "flush while one runs": flush_while_busy,
        "one of two is aborted": abort_in_a_batch,
    }
    return [Case(f"act: {name}", act=act) for name, act in acts.items()]


def _open(
    client: Client, prompt: list[int] = IDS, *, rid: str | None = None, new_tokens: int = 2000
) -> tuple[Stream, Iterator[dict[str, Any]]]:
    """A stream behind its first event."""
    stream = client.stream(prompt, max_new_tokens=new_tokens, sampling=ENDLESS, **({} if rid is None else {"rid": rid}))
    events = stream.events()
    next(events)
    return stream, events


def _end_of(events: Iterator[dict[str, Any]]) -> Any:
    """How a stream ended: the kind of its finish reason, or the status of an error."""
    try:
        last = next(iter(deque(events, maxlen=1)), None)
    except RequestFailed as failure:
        return failure.status
    return last and last["meta_info"]["finish_reason"]["type"]


def _settle(client: Client) -> Any:
    """Waits until nothing runs, and shows that the server answers."""
    deadline = time.monotonic() + IDLE_LIMIT_S
    while not client.flush_cache():
        if time.monotonic() > deadline:
            return "not idle"
        time.sleep(0.2)
    return client.generate(IDS, max_new_tokens=4, sampling=ENDLESS).ids


def disconnect(client: Client, prompt: list[int] = IDS) -> Any:
    stream, _ = _open(client, prompt)
    stream.close()
    return _settle(client)


def disconnect_long(client: Client) -> Any:
    return disconnect(client, LONG_IDS)


def _abort(client: Client, rid: str, body: dict[str, Any]) -> Any:
    stream, events = _open(client, rid=rid)
    with stream:
        status, _ = client.request("POST", "/abort_request", body)
        return status, _end_of(events), _settle(client)


def abort_by_id(client: Client) -> Any:
    return _abort(client, "conformance-abort", {"rid": "conformance-abort"})


def abort_all(client: Client) -> Any:
    return _abort(client, "conformance-all", {"abort_all": True})


def abort_by_prefix(client: Client) -> Any:
    """The main process knows whole ids only, where it is one process: the request goes on."""
    stream, events = _open(client, rid="conformance-prefix-1", new_tokens=100)
    with stream:
        status, _ = client.request("POST", "/abort_request", {"rid": "conformance-prefix"})
        return status, _end_of(events), _settle(client)


def abort_in_a_batch(client: Client) -> Any:
    first, events = _open(client, rid="conformance-x")
    second, others = _open(client, rid="conformance-y", new_tokens=200)
    with first, second:
        client.abort("conformance-x")
        return _end_of(events), _end_of(others), _settle(client)


def pause_in_place(client: Client) -> Any:
    stream, events = _open(client, new_tokens=40)
    with stream:
        paused = client.request("POST", "/pause_generation", {"mode": "in_place"})
        busy = client.flush_cache()
        continued = client.request("POST", "/continue_generation", {})
        return paused, busy, continued, _end_of(events), _settle(client)


def pause_by_abort(client: Client) -> Any:
    stream, events = _open(client)
    with stream:
        paused = client.request("POST", "/pause_generation", {"mode": "abort"})
        ended = _end_of(events)
        return paused, ended, client.request("POST", "/continue_generation", {}), _settle(client)


def held_back(client: Client) -> Any:
    """A client without patience meets a pause."""
    impatient = Client(client.port, timeout_s=1.0)
    client.request("POST", "/pause_generation", {"mode": "in_place"})
    try:
        impatient.generate(IDS, max_new_tokens=2)
        answered = True
    except TimeoutError:
        answered = False
    client.request("POST", "/continue_generation", {})
    return answered, _settle(client)


def flush_while_busy(client: Client) -> Any:
    stream, events = _open(client, new_tokens=100)
    with stream:
        return client.flush_cache(), _end_of(events), _settle(client)
