"""A home's rows on every instance: what was told, one token on each step, with a checksum that costs a steady step nothing."""

from hypothesis import given
from hypothesis import strategies as st

from sglang_dcp.ledger.messages import Row
from sglang_dcp.ledger.row_table import RowTable, advance, checksum

number = st.integers(0, 2**40)
rows = st.lists(st.builds(Row, number, number, st.integers(1, 9000), number), max_size=5).map(tuple)


def test_steady_rows_advance_by_one_token() -> None:
    assert advance([Row(1, 0, 24), Row(2, 40, 1)]) == (Row(1, 24, 1), Row(2, 41, 1))


@given(rows, st.data())
def test_checksum_sees_a_changed_row(table: tuple[Row, ...], data: st.DataObject) -> None:
    if not table:
        assert checksum(table) == 0
        return
    i = data.draw(st.integers(0, len(table) - 1))
    row = table[i]
    for other in (Row(row.handle + 1, row.prefix_len, row.num_new), Row(row.handle, row.prefix_len + 1, row.num_new)):
        assert checksum((*table[:i], other, *table[i + 1 :])) != checksum(table)
    assert checksum(table) < 2**31


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
            table.tell(told)
        assert len(table) == len(expected) and table.checksum == checksum(expected)
        if step in looked_at:
            assert table.rows == expected and tuple(table) == expected
    assert table.rows == expected
