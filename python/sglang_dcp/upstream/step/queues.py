"""Requests of this home that SGLang's own queues do not show as what they are."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Queues:
    """parked: requests that sit out decode steps for want of a tail page. waiting: those with an open reservation, by handle.

    blocked: the local request that found no room last; room: pages that local ones could have in the round before, None where it was found
    blocked since; asked_elsewhere: handle of the newest one whose pages were asked for elsewhere instead.
    placements_taken_in: number of the newest placement by the router that has arrived here.
    flushing: a flush waits until nothing is retained. preallocated: SGLang's entries of requests that begin their transfer in this round.
    """

    parked: list[Any] = field(default_factory=list)
    waiting: dict[int, Any] = field(default_factory=dict)
    blocked: Any = None
    room: int | None = None
    asked_elsewhere: int | None = None
    placements_taken_in: int = 0
    flushing: bool = False
    preallocated: list[Any] = field(default_factory=list)
