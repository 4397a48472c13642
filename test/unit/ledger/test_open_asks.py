"""Turns of open asks: the first in every step, the others one after the other, nobody twice."""

import random

from sglang_dcp.ledger.messages import AskGrowth
from sglang_dcp.ledger.open_asks import OpenAsks
from sglang_dcp.ledger.reservations import MOST_REFUSED, ReservationTable
from sglang_dcp.policy.split_limits import Layout, SplitLimits


def test_no_ask_is_looked_at_twice_in_a_step_and_all_are_in_a_few() -> None:
    """Whatever was taken or put between steps, also all asks up to the one whose turn it was."""
    rng = random.Random(5)
    asks: OpenAsks[AskGrowth] = OpenAsks()
    waiting: dict[tuple[int, int], int] = {}
    for step in range(3000):
        for _ in range(rng.choice((0, 0, 1, 9))):
            ask = AskGrowth(rng.randrange(40), rng.randrange(60), False, 1, (0,))
            asks.put(0, ask)
            waiting[0, ask.handle] = step
        for key in sorted(waiting, key=lambda key: (asks.by_key[key].born, key))[: rng.choice((0, 0, 0, 2, 30))]:
            asks.take(key)
            del waiting[key]
        looked_at = []
        for order, _ in asks.in_turn():
            looked_at.append(order[1:])
            if len(looked_at) > 5:
                break
        assert len(set(looked_at)) == len(looked_at) == min(6, len(asks)), step
        waiting.update(dict.fromkeys(looked_at, step))
        assert all(step - last <= 8 for last in waiting.values())


def test_one_stuck_request_is_no_victim_while_others_get_on() -> None:
    """The asks ahead of it were looked at last, in a step that stopped there, and are over now."""
    table = ReservationTable(SplitLimits(100, 2, 100, Layout(2, 2)))
    for handle in range(1, MOST_REFUSED + 5):
        table.ask(0, AskGrowth(handle, handle, handle == MOST_REFUSED + 3, 7, (0,)))
    assert not table.decide([0, 0], [100, 100], anybody_runs=True).victims
    for handle in range(1, MOST_REFUSED + 3):
        table.withdraw(0, handle)
    assert len(table) == 2
    assert not table.decide([0, 0], [100, 100], anybody_runs=True).victims
