"""What stays of a list where entries leave and join: against looking at every entry."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sglang_dcp.ledger.kept_runs import Run, joined, kept_runs, left, narrowed, squeezed, stretches, without
from sglang_dcp.ledger.steady import SteadyRows

names = st.lists(st.integers(0, 30), unique=True, max_size=20)


@st.composite
def lists(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """A batch and the next one: some left, some joined in the middle or at the end, and once in a while all are mixed."""
    before = draw(names)
    stayed = [name for name in before if draw(st.integers(0, 4))]
    now = list(stayed)
    for name in draw(st.lists(st.integers(40, 60), unique=True, max_size=4)):
        now.insert(draw(st.sampled_from([len(now), draw(st.integers(0, len(now)))])), name)
    return before, draw(st.permutations(now)) if draw(st.booleans()) and draw(st.booleans()) else now


def pairs(runs: list[Run]) -> list[tuple[int, int]]:
    """(place before, place now) of every entry of the runs."""
    return [(old + index, new + index) for old, new, size in runs for index in range(size)]


def check_order(runs: list[Run]) -> None:
    assert all(size > 0 for _, _, size in runs)
    for (old, new, size), (next_old, next_new, _) in zip(runs, runs[1:], strict=False):
        assert next_old >= old + size and next_new >= new + size


@given(lists())
def test_runs_are_what_both_have(both: tuple[list[int], list[int]]) -> None:
    before, now = both
    runs = kept_runs(before, now)
    check_order(runs)
    assert all(before[old] == now[new] for old, new in pairs(runs))
    stayed = [name for name in before if name in now]
    if [name for name in now if name in before] == stayed:
        assert [before[old] for old, _ in pairs(runs)] == stayed
    assert left(runs, len(before)) == sorted(set(range(len(before))) - {old for old, _ in pairs(runs)})
    assert joined(runs, len(now)) == sorted(set(range(len(now))) - {new for _, new in pairs(runs)})
    built: list[int] = []
    for others, stretch in stretches(runs, len(now)):
        built += [now[index] for index in others]
        built += before[stretch]
    assert built == now


@given(lists(), st.data())
def test_runs_are_narrowed_to_what_agrees(both: tuple[list[int], list[int]], data: st.DataObject) -> None:
    before, now = both
    runs = kept_runs(before, now)
    kind = st.integers(0, 1)
    was, became = (bytes(data.draw(st.lists(kind, min_size=len(of), max_size=len(of)))) for of in both)
    found = narrowed(runs, was, became)
    check_order(found)
    assert pairs(found) == [(old, new) for old, new in pairs(runs) if was[old] == became[new]]
    places = sorted(data.draw(st.sets(st.integers(0, max(0, len(now) - 1)))))
    rest = without(runs, places)
    check_order(rest)
    assert pairs(rest) == [(old, new) for old, new in pairs(runs) if new not in places]


@given(lists(), st.sets(st.integers(0, 60)))
def test_runs_of_lists_that_leave_the_same_ones_out(both: tuple[list[int], list[int]], absent: set[int]) -> None:
    before, now = both
    was, became = ([place for place, name in enumerate(of) if name in absent] for of in both)
    seen = [[name for name in of if name not in absent] for of in both]
    found = squeezed(kept_runs(before, now), was, became)
    check_order(found)
    assert all(seen[0][old] == seen[1][new] for old, new in pairs(found))
    assert len(pairs(found)) == sum(before[old] not in absent for old, _ in pairs(kept_runs(before, now)))


@given(st.lists(st.tuples(lists(), st.integers(0, 9)), min_size=1, max_size=5), st.sampled_from([1, 2, 5, 64, 1024]), st.data())
def test_rows_that_were_moved_are_rows_told_anew(
    changes: list[tuple[tuple[list[int], list[int]], int]], page_size: int, data: st.DataObject
) -> None:
    """One batch after another, however far they went on in between."""
    some = data.draw(st.booleans())
    length, grows = {}, {}
    keys: list[int] = []
    rows = SteadyRows(keys, [], page_size, [] if some else None)
    for (_, now), steps in changes:
        for _ in range(steps):
            rows.age += 1
            for name in keys:
                length[name] += grows[name]
        runs = kept_runs(keys, now)
        for index in joined(runs, len(now)):
            length[now[index]], grows[now[index]] = data.draw(st.integers(1, 3000)), data.draw(st.booleans()) if some else True
        tokens, growing = [length[name] for name in now], [grows[name] for name in now] if some else None
        looked_at = {index: tokens[index] for index in joined(runs, len(now))}
        rows, keys = rows.moved(runs, now, looked_at, growing), now
        afresh = SteadyRows(now, tokens, page_size, growing)
        for ahead in (0, 1, page_size - 1):
            assert rows.beginning(ahead) == afresh.beginning(ahead)
            assert [rows.near_end(left, ahead) for left in (0, 1, 8)] == [afresh.near_end(left, ahead) for left in (0, 1, 8)]
        assert all(rows.tokens(index) == tokens[index] for index, name in enumerate(now) if grows[name])
        assert len(rows) == len(now)
