"""Digests of what is open and of what was decided: equal where instances agree, and nowhere else."""

from __future__ import annotations

import dataclasses

from hypothesis import given
from hypothesis import strategies as st

from sglang_dcp.ledger.decision_digest import DecisionDigest
from sglang_dcp.ledger.digest import MASK, OpenDigest, digest
from sglang_dcp.ledger.messages import AskAdmission, AskGrowth
from sglang_dcp.ledger.reservations import Decision, Grant, GrantedSegment, ReservationTable
from sglang_dcp.policy.split_limits import Layout, SplitLimits

word = st.integers(-(2**62), 2**62)
words = st.lists(word, max_size=6)


@given(words, words)
def test_other_words_give_another_digest(some: list[int], others: list[int]) -> None:
    assert (digest(some) == digest(others)) == (some == others)
    assert 0 <= digest(some) <= MASK


@given(st.lists(st.tuples(st.integers(0, 5), st.one_of(st.none(), words)), max_size=20), st.randoms())
def test_what_is_open_counts_not_how_it_came(changes: list[tuple[int, list[int] | None]], order) -> None:
    """None closes an entry."""
    kept, entries = OpenDigest(), {}
    for key, content in changes:
        if content is None:
            kept.take(key)
            entries.pop(key, None)
        else:
            kept.put(key, [key, *content])
            entries[key] = content
    fresh, left = OpenDigest(), list(entries.items())
    order.shuffle(left)
    for key, content in left:
        fresh.put(key, [key, *content])
    assert kept.value == fresh.value
    if entries:
        fresh.take(left[0][0])
        assert kept.value != fresh.value


def test_the_table_keeps_the_digest_of_its_asks() -> None:
    """Through asks, replacements, grants and withdrawals; an ask for growth is none for admission."""
    table = ReservationTable(SplitLimits(9, 2, 9, Layout(2, 2)))
    admission, growth = AskAdmission(1, 0, False, ((0, 2), (1, 3))), AskGrowth(1, 0, True, 4, (0, 1))
    seen = {table.digest}
    for ask in (admission, growth, dataclasses.replace(growth, page_index=5), dataclasses.replace(admission, born=1)):
        table.ask(0, ask)
        seen.add(table.digest)
    assert len(seen) == 5
    table.decide([9, 9], [9, 9], True)
    assert not len(table) and table.digest == 0
    table.ask(1, admission)
    table.withdraw(1, 1)
    assert table.digest == 0


GRANT = Grant(0, 7, (GrantedSegment(1, 0, 3), GrantedSegment(0, 3, 2)))
DECISION = Decision((GRANT,), (0, 4), ((1, 9),))
OTHERS = {
    "no grant": dataclasses.replace(DECISION, grants=()),
    "a grant of another handle": dataclasses.replace(DECISION, grants=(dataclasses.replace(GRANT, handle=8),)),
    "segments in another order": dataclasses.replace(DECISION, grants=(dataclasses.replace(GRANT, segments=GRANT.segments[::-1]),)),
    "pages that moved": dataclasses.replace(
        DECISION, grants=(dataclasses.replace(GRANT, segments=(GrantedSegment(1, 0, 4), GrantedSegment(0, 4, 1))),)
    ),
    "promised elsewhere": dataclasses.replace(DECISION, promised=(4, 0)),
    "another victim": dataclasses.replace(DECISION, victims=((9, 1),)),
    "no victim": dataclasses.replace(DECISION, victims=()),
}


def test_each_part_of_a_decision_counts() -> None:
    def after(*decisions: tuple[Decision, int]) -> int:
        history = DecisionDigest()
        for decision, open_asks in decisions:
            history.add(decision, open_asks)
        return history.value

    values = {name: after((other, 5)) for name, other in OTHERS.items()}
    values |= {"itself": after((DECISION, 5)), "other asks were open": after((DECISION, 6))}
    assert len(set(values.values())) == len(values), values
    quiet = Decision((), (0, 0), ())
    assert after((DECISION, 5), (quiet, 0)) != after((quiet, 0), (DECISION, 5))
    assert after((OTHERS["no victim"], 5), (quiet, 0)) != after((DECISION, 5), (quiet, 0)), "what differed once differs for good"
