"""The turns of a closed loop again, on another server, at the times at which the first one was sent them."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from benchmark.serving.conversations.closed_loop import ServedTurn, ask_turn
from benchmark.serving.conversations.sessions import Session
from testing.client import Client

Times = Mapping[tuple[int, int], float]
"""(session, index of the turn) -> seconds after the beginning."""


class StickyHomes:
    """A client in front of instances that know nothing of each other: all turns of a session go to one of them, which is, when the session
    begins, that with the fewest open sessions, of equals the one with the fewest so far, of these the first."""

    def __init__(self, num_instances: int) -> None:
        self._open = [0] * num_instances
        self._begun = [0] * num_instances
        self._lock = threading.Lock()

    def begin(self) -> int:
        with self._lock:
            home = min(range(len(self._open)), key=lambda rank: (self._open[rank], self._begun[rank], rank))
            self._open[home] += 1
            self._begun[home] += 1
            return home

    def end(self, home: int) -> None:
        with self._lock:
            self._open[home] -= 1


def converse_again(client: Client, sessions: Sequence[Session], times: Times, homes: StickyHomes | None = None) -> list[ServedTurn]:
    """All turns, in the order in which they were sent: each at its time, or when the answer to the one before it is there, if that is
    later. homes: names an instance for every session; without, the server chooses one for every turn."""
    started = time.monotonic()
    with ThreadPoolExecutor(len(sessions)) as pool:
        every = [turn for turns in pool.map(lambda session: _again(client, session, times, homes, started), sessions) for turn in turns]
    return sorted(every, key=lambda turn: turn.sent_s)


def _again(client: Client, session: Session, times: Times, homes: StickyHomes | None, started: float) -> list[ServedTurn]:
    served, home = [], None
    for index in range(len(session.turns)):
        time.sleep(max(0.0, started + times[session.number, index] - time.monotonic()))
        if homes is not None and home is None:
            home = homes.begin()
        served.append(ask_turn(client, session, index, started, home))
    if homes is not None and home is not None:
        homes.end(home)
    return served


def mean_lateness_s(served: Sequence[ServedTurn], times: Times) -> float:
    """How much later than at its time a turn was sent."""
    return round(sum(turn.sent_s - times[turn.session, turn.index] for turn in served) / len(served), 3)
