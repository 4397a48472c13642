"""A mixed load for a served cluster: lengths of a real trace scaled to the pools, Poisson arrivals, some requests aborted or cut off."""

from __future__ import annotations

import csv
import json
import random
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LENGTHS = Path(__file__).resolve().parents[2] / "test" / "data" / "mooncake_lengths.csv"
ALPHABET = "abcdefghijklmnopqrstuvwxyz \n"


@dataclass(frozen=True)
class LoadRequest:
    """arrival_s after the start; lengths in tokens; leave: "" (stays), "abort" or "disconnect" after leave_s."""

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    leave: str
    leave_s: float
    seed: int

    @property
    def text(self) -> str:
        rng = random.Random(self.seed)
        return "".join(rng.choice(ALPHABET) for _ in range(self.prompt_tokens))


@dataclass
class Outcome:
    """What became of the load. `unexpected`: messages of requests that should have been answered and were not.

    `finished`: when a request was answered or left, by rid (seconds since 1970).
    """

    answered: int = 0
    aborted: int = 0
    disconnected: int = 0
    degrees: list[tuple[int, int, int]] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    finished: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0


def scaled_load(count: int, *, longest: int, per_second: float, leaving: float, seed: int) -> list[LoadRequest]:
    """The first `count` lengths of the trace, scaled so that its longest prompt has `longest` tokens."""
    with LENGTHS.open() as lines:
        rows = list(csv.DictReader(line for line in lines if not line.startswith("#")))
    factor = longest / max(int(row["input_length"]) for row in rows)
    rng, arrival, load = random.Random(seed), 0.0, []
    for index in range(count):
        row = rows[index % len(rows)]
        arrival += rng.expovariate(per_second)
        leave = rng.choice(("abort", "disconnect")) if rng.random() < leaving else ""
        load.append(
            LoadRequest(
                arrival,
                max(4, round(int(row["input_length"]) * factor)),
                max(2, round(int(row["output_length"]) * factor * 2)),
                leave,
                rng.random() * 2.0,
                seed * 100_003 + index,
            )
        )
    return load


def run_load(port: int, load: list[LoadRequest], *, most_open: int = 64, timeout_s: float = 300.0) -> Outcome:
    """Sends the load at its arrival times, at most `most_open` requests at once, and waits for all of them."""
    outcome, lock, started = Outcome(), threading.Lock(), time.monotonic()
    with ThreadPoolExecutor(most_open) as pool:
        for index, request in enumerate(load):
            time.sleep(max(0.0, started + request.arrival_s - time.monotonic()))
            pool.submit(_send, port, request, f"load-{request.seed}-{index}", outcome, lock, timeout_s)
    outcome.seconds = time.monotonic() - started
    return outcome


def _send(port: int, request: LoadRequest, rid: str, outcome: Outcome, lock: threading.Lock, timeout_s: float) -> None:
    sampling = {"temperature": 0, "max_new_tokens": request.output_tokens, "ignore_eos": True}
    body = {"text": request.text, "sampling_params": sampling, "rid": rid, "stream": request.leave == "disconnect"}
    if request.leave == "abort":
        threading.Timer(request.leave_s, _abort, (port, rid)).start()
    try:
        with _post(port, "/generate", body, timeout_s) as response:
            if request.leave == "disconnect":
                _read_for(response, request.leave_s)
                with lock:
                    outcome.disconnected += 1
                    outcome.finished[rid] = time.time()
                return
            answer = json.load(response)
    except OSError as error:
        with lock:
            outcome.unexpected.append(f"{rid} ({request.prompt_tokens} tokens): {error}")
        return
    _record(request, rid, answer["meta_info"], outcome, lock)


def _record(request: LoadRequest, rid: str, meta: dict[str, Any], outcome: Outcome, lock: threading.Lock) -> None:
    reason = meta["finish_reason"]["type"]
    with lock:
        outcome.finished[rid] = time.time()
        if reason == "abort":
            outcome.aborted += 1
            if request.leave != "abort":
                outcome.unexpected.append(f"{rid}: aborted though nobody asked: {meta['finish_reason']}")
        elif meta["completion_tokens"] != request.output_tokens:
            outcome.unexpected.append(f"{rid}: {meta['completion_tokens']} of {request.output_tokens} tokens")
        else:
            outcome.answered += 1
            if "dyncp" in meta:
                outcome.degrees.append((request.prompt_tokens, meta["dyncp"]["degree_start"], meta["dyncp"]["degree_end"]))


def _read_for(response: Any, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and response.readline():
        pass


def _abort(port: int, rid: str) -> None:
    try:
        _post(port, "/abort_request", {"rid": rid}, 30.0).close()
    except OSError:
        return


def _post(port: int, path: str, body: dict[str, Any], timeout_s: float) -> Any:
    data = json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"})
    return urllib.request.urlopen(request, timeout=timeout_s)
