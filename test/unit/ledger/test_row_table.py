"""A home's rows on every instance: what was told, one token on each step, with a checksum that costs a steady step nothing."""

import dataclasses
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from sglang_dcp.ledger import row_table
from sglang_dcp.ledger.messages import Row, RowColumns
from sglang_dcp.ledger.row_table import RowTable

number = st.integers(0, 2**40)
rows = st.lists(st.builds(Row, number, number, st.integers(1, 9000), number), max_size=5).map(tuple)


def advance(told: Sequence[Row]) -> tuple[Row, ...]:
    return tuple(row_table.advance(RowColumns.of(told)))


def checksum(told: Sequence[Row]) -> int:
    return row_table.checksum(RowColumns.of(told))


def test_steady_rows_advance_by_one_token() -> None:
    assert advance([Row(1, 0, 24), Row(2, 40, 1)]) == (Row(1, 24, 1), Row(2, 41, 1))


FIELDS = ("handle", "prefix_len", "num_new", "route")
some_rows = st.one_of(
    st.lists(st.builds(Row, number, number, length, number), min_size=1, max_size=6).map(tuple)
    for length in (st.just(1), st.integers(1, 9000))
)
shift = st.integers(1, 2**20)


def put(table: tuple[Row, ...], index: int, field: str, value: int) -> tuple[Row, ...]:
    return (*table[:index], dataclasses.replace(table[index], **{field: value}), *table[index + 1 :])


def differ(table: tuple[Row, ...], other: tuple[Row, ...]) -> bool:
    """Whether their checksums do; rows that decode then do so in later steps, too."""
    tables = RowTable(), RowTable()
    for rows_now, kept in zip((table, other), tables, strict=True):
        kept.tell(RowColumns.of(rows_now))
    answer = tables[0].checksum != tables[1].checksum
    for _ in range(3 if all(row.num_new == 1 for row in (*table, *other)) else 0):
        for kept in tables:
            kept.advance()
        assert (tables[0].checksum != tables[1].checksum) == answer
    return answer


def test_a_checksum_fits_a_control_column() -> None:
    assert checksum(()) == 0
    assert 0 < checksum([Row(1, 2**40, 1, 2**61)]) < 2**62


@given(some_rows, st.data(), st.sampled_from(FIELDS), shift)
def test_a_change_of_one_number_is_seen(table: tuple[Row, ...], data: st.DataObject, field: str, by: int) -> None:
    index = data.draw(st.integers(0, len(table) - 1))
    assert differ(table, put(table, index, field, getattr(table[index], field) + by))


@given(some_rows, st.data(), st.sampled_from(FIELDS), st.sampled_from(FIELDS), shift, st.integers(-1000, 1000).filter(bool))
def test_two_changes_never_make_up_for_each_other(
    table: tuple[Row, ...], data: st.DataObject, field: str, other: str, by: int, ratio: int
) -> None:
    """In one row or two, by the same amount or by any multiple of it, as weights of a linear sum would have it."""
    index, second = data.draw(st.integers(0, len(table) - 1)), data.draw(st.integers(0, len(table) - 1))
    changed = put(table, index, field, getattr(table[index], field) + by)
    changed = put(changed, second, other, abs(getattr(changed[second], other) - ratio * by))
    assert differ(table, changed) == (changed != table)


@given(some_rows, st.data())
def test_rows_that_change_places_are_seen(table: tuple[Row, ...], data: st.DataObject) -> None:
    other = tuple(data.draw(st.permutations(table)))
    assert (checksum(other) != checksum(table)) == (other != table)


@given(some_rows, shift)
def test_rows_that_are_steps_ahead_are_seen(table: tuple[Row, ...], by: int) -> None:
    ahead = tuple(dataclasses.replace(row, prefix_len=row.prefix_len + by) for row in table)
    assert differ(table, ahead)


def test_what_the_weights_of_a_sum_let_through_is_seen() -> None:
    """With handle * 8191 + prefix_len * 31 + num_new + route * 127, these were equal."""
    table = Row(7, 400, 40, 9), Row(8, 10, 1, 9)
    assert checksum(table) != checksum([Row(7, 401, 9, 9), table[1]])
    assert checksum(table) != checksum([Row(7, 400, 40 + 127, 8), table[1]])
    assert checksum(table) != checksum([Row(6, 400, 40 + 8191, 9), table[1]])
    assert checksum(table) != checksum([table[0], Row(8, 10, 1 + 2_147_483_647, 9)])


@given(st.lists(st.one_of(rows, st.none()), max_size=12), st.sets(st.integers(0, 11)))
def test_a_table_is_its_rows_however_they_came(steps: list[tuple[Row, ...] | None], looked_at: set[int]) -> None:
    """None: nothing was told in that step. Looking at the rows in between changes nothing."""
    table, expected = RowTable(), ()
    for step, told in enumerate(steps):
        expected = advance(expected) if told is None else told
        if told is None:
            assert table.next_checksum() == checksum(expected)
            table.advance()
        else:
            table.tell(RowColumns.of(told))
        assert len(table) == len(expected) and table.checksum == checksum(expected)
        if step in looked_at:
            assert table.rows == expected and tuple(table) == expected
    assert table.rows == expected
