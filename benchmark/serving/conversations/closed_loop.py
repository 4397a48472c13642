"""Sessions in a closed loop: each sends its next turn when the answer to the last one is there and its user has thought."""

from __future__ import annotations

import queue
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from benchmark.serving.conversations.sessions import Session, prompt_ids, served_output
from sglang_dcp.conversations.turns import Turn
from testing.client import Client


@dataclass(frozen=True)
class ServedTurn:
    """sent_s, ended_s: seconds after the beginning. shards: instances at the end, none on a server that does not tell. ttft_s: from the
    request's arrival at the server to the end of its prefill, none from a server without --enable-metrics."""

    session: int
    index: int
    sent_s: float
    ended_s: float
    prompt_tokens: int
    cached_tokens: int
    home: int | None
    shards: tuple[int, ...]
    ttft_s: float | None = None


def converse(client: Client, sessions: Sequence[Session], at_once: int) -> list[ServedTurn]:
    """All turns of all sessions, `at_once` sessions open at a time, in the order in which they were sent."""
    waiting: queue.SimpleQueue[Session] = queue.SimpleQueue()
    for session in sessions:
        waiting.put(session)
    started = time.monotonic()

    def serve_sessions(worker: int) -> list[ServedTurn]:
        served: list[ServedTurn] = []
        time.sleep(0.2 * worker)
        while True:
            try:
                session = waiting.get_nowait()
            except queue.Empty:
                return served
            served += _one_session(client, session, started)

    with ThreadPoolExecutor(at_once) as pool:
        every = [turn for turns in pool.map(serve_sessions, range(at_once)) for turn in turns]
    return sorted(every, key=lambda turn: turn.sent_s)


def _one_session(client: Client, session: Session, started: float) -> list[ServedTurn]:
    served = []
    for index, think_s in enumerate(session.think_s):
        time.sleep(think_s)
        served.append(ask_turn(client, session, index, started))
    return served


def ask_turn(client: Client, session: Session, index: int, started: float, home: int | None = None) -> ServedTurn:
    """Sends a turn now and waits for its answer. started: by time.monotonic(). home: the instance that the client names, if it does."""
    sent = time.monotonic()
    ids, named = prompt_ids(session, index), {} if home is None else {"routed_dp_rank": home}
    answer = client.generate(ids, max_new_tokens=served_output(session.turns[index]), sampling={"ignore_eos": True}, **named)
    return _record(session, index, sent - started, time.monotonic() - started, answer.meta, home)


def _record(session: Session, index: int, sent_s: float, ended_s: float, meta: dict[str, Any], home: int | None) -> ServedTurn:
    where = meta.get("dyncp") or {"home": meta.get("dp_rank", home)}
    shards = tuple(shard["rank"] for shard in where.get("shards", ()))
    tokens, ttft_s = (meta["prompt_tokens"], meta["cached_tokens"]), meta.get("first_token_latency")
    return ServedTurn(session.number, index, sent_s, ended_s, *tokens, where["home"], shards, ttft_s)


def as_recorded(sessions: Sequence[Session], served: Sequence[ServedTurn]) -> list[Turn]:
    """The turns for the simulator, at the times at which a server was sent them and for as long as it took. In order of arrival."""
    by_number = {session.number: session for session in sessions}
    return [
        replace(
            by_number[turn.session].turns[turn.index],
            arrival_s=turn.sent_s,
            conversation=turn.session,
            service_s=turn.ended_s - turn.sent_s,
        )
        for turn in served
    ]


def ttft_median_s(served: Sequence[ServedTurn]) -> float | None:
    """Of the turns whose server tells; None where none does."""
    told = [turn.ttft_s for turn in served if turn.ttft_s is not None]
    return round(statistics.median(told), 3) if told else None


def hit_share(served: Sequence[ServedTurn]) -> float:
    """Prompt tokens that were found in a cache."""
    return round(sum(turn.cached_tokens for turn in served) / sum(turn.prompt_tokens for turn in served), 4)
