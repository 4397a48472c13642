"""Whose turn it is while an ask waits: its own, in which what it needs is promised to it, or the others', in which nothing is."""

from __future__ import annotations

from sglang_dcp.policy.growth import Order

FIRST_TURN_STEPS = 64
"""Shorter waits than this are the waiting ask's alone."""
LONG_WAIT_STEPS = 2 * FIRST_TURN_STEPS
"""Who has waited longer, for two turns, takes pages that others leave to growth: an ask, or a local request. It may fit no pool in which
somebody always is."""


class PromiseTurns:
    """Turns of the first waiting ask. Each pair of turns is twice as long as the one before.

    So the others may start in half of the steps that an ask waits (but for the first turn and the last one), however large it is. And none
    waits for ever: once a turn is as long as the requests that run can last, all that it was promised is free at its end.
    """

    def __init__(self) -> None:
        self._waits: Order | None = None
        self._steps = 0
        self._turn = FIRST_TURN_STEPS

    def are_long(self, waits: Order) -> bool:
        """Whether `waits` is the first waiting ask, and has been for its first two turns."""
        return waits == self._waits and self._turn > FIRST_TURN_STEPS

    def is_promised(self, waits: Order) -> bool:
        """Whether the step is one of the own turn of `waits`, the first waiting ask. Called once in each step in which there is one; the
        turns begin anew with another."""
        if waits != self._waits:
            self._waits, self._steps, self._turn = waits, 0, FIRST_TURN_STEPS
        if self._steps == 2 * self._turn:
            self._steps, self._turn = 0, 2 * self._turn
        self._steps += 1
        return self._steps <= self._turn
