"""When a row's line of the device's page table is filled anew."""

import ctypes
import random
from types import SimpleNamespace

import numpy as np
import pytest

from sglang_dcp.dataflow.graph.static_tables import FROM_TOKEN_TABLE, PageLines, shard_tokens, slot_of
from sglang_dcp.dataflow.graph.table_rows import ListedRow, PooledRow
from sglang_dcp.dataflow.graph.tables_ahead import NO_PAGE, TABLES_AHEAD
from sglang_dcp.dataflow.step_rows import StepRows
from sglang_dcp.ledger.steady import SteadyRows

PAGE_SIZE = 16


def lines() -> PageLines:
    return PageLines(num_entries=6, width=20, page_size=PAGE_SIZE)


def copied(table: PageLines, step: int, rows: list) -> list[int]:
    """Lines of the token table that the step copies, and those from which it takes one page."""
    given = table.fill(step, rows)
    appended = [FROM_TOKEN_TABLE - page for page in given.rows[:, 2].tolist() if page <= FROM_TOKEN_TABLE]
    return sorted(given.copies[1].tolist()) + appended


def test_a_pooled_row_is_copied_in_its_first_two_steps() -> None:
    """SGLang may replace a new row's pages by those of the prefix cache behind its first decode step."""
    table = lines()
    assert copied(table, 5, [PooledRow("a", 3, 40)]) == [3]
    assert copied(table, 6, [PooledRow("a", 3, 41), PooledRow("b", 4, 70)]) == [3, 4]
    assert copied(table, 7, [PooledRow("a", 3, 42), PooledRow("b", 4, 71)]) == [4]
    assert copied(table, 8, [PooledRow("a", 3, 43), PooledRow("b", 4, 72)]) == []
    assert copied(table, 9, [PooledRow("a", 3, 44), PooledRow("c", 5, 7)]) == [5]
    assert copied(table, 10, [PooledRow("a", 3, 45), PooledRow("c", 5, 8)]) == [5], "a row of one page likewise"
    assert copied(table, 12, [PooledRow("a", 3, 47)]) == [3], "a step between: pages may be others"


def test_requests_of_one_id_have_lines_of_their_own() -> None:
    """Two tokenizer workers, or a client that asks again, may give two requests one id: each attends its own pages."""
    reqs = [SimpleNamespace(rid="mine", dyncp=None, kv=SimpleNamespace(req_pool_idx=line)) for line in (3, 4)]
    participant = SimpleNamespace(rank=0, group=range(1), guests=None, step=5)
    batch = SimpleNamespace(rows=SteadyRows(reqs, [40, 40]), version=1, runs=[], routes={})
    _, rows = StepRows(participant, batch).table_rows()  # type: ignore[arg-type]
    assert len({row.key for row in rows}) == 2
    table = lines()
    assert copied(table, 5, rows) == [3, 4] and len(set(table.table[:, 0].tolist())) == 2


def test_a_pooled_row_that_begins_a_page_takes_that_one_alone() -> None:
    table = lines()
    for step in range(5):
        copied(table, step, [PooledRow("a", 3, 28 + step)])
    assert copied(table, 5, [PooledRow("a", 3, 33)]) == [3] and table.table[0, 2] == FROM_TOKEN_TABLE - 3
    assert table.advance(6) == [] and table.table[0, 2] == NO_PAGE
    assert [table.advance(step) for step in range(7, 22)] == [[]] * 14 + [[4]]


def test_listed_pages_are_written_once_and_lines_are_reused() -> None:
    table = lines()
    held = [(index, 100 + index) for index in range(10)]
    for step in range(4):
        given = table.fill(step, [ListedRow((1, step), 80, held, grows=False, arrives=False)])
        assert given.writes[1].tolist() == [100, 101, 102, 103, 104]
    given = table.fill(4, [ListedRow((1, 3), 81, held, grows=True, arrives=True)])
    assert given.writes.shape[1] == 0 and given.rows[0].tolist()[1:] == [81, 105, 105 * PAGE_SIZE]
    entries = {table.fill(step, [ListedRow((2, step), 80, held, grows=False, arrives=False)]).rows[0, 0] for step in range(5, 30)}
    assert entries <= set(range(6))


def test_a_row_longer_than_its_line_is_refused() -> None:
    table = lines()
    table.fill(0, [ListedRow("a", 20 * PAGE_SIZE, [(index, 1 + index) for index in range(21)], grows=True, arrives=False)])
    with pytest.raises(ValueError, match="a row has 21 pages here, a line of the page table holds 20"):
        table.advance(1)


def test_tables_made_ahead_are_those_of_each_step() -> None:
    """Rows of every kind over many steps on, pages begun in all of them: against each row's own pages and length."""
    rng = random.Random(4)
    rows: list[ListedRow | PooledRow] = []
    for index in range(40):
        length, grows = rng.randrange(1, 5 * PAGE_SIZE), index % 3 > 0
        tail = length // PAGE_SIZE
        held = [(page, 100 * (index + 1) + page) for page in range(15) if (grows if page >= tail else page % 2)]
        row = ListedRow(index, length, held, grows=grows, arrives=index % 3 == 1)
        rows.append(PooledRow(index, index, length) if index % 4 == 0 else row)
    table = PageLines(num_entries=40, width=20, page_size=PAGE_SIZE)
    table.fill(0, rows)
    entries = table.table[:, 0].tolist()
    for step in range(1, 5 * TABLES_AHEAD):
        begun, expected, needed = table.advance(step), [], []
        for index, row in enumerate(rows):
            length, first, slot = row.length + step, (row.length + step) % PAGE_SIZE == 1, -1
            if isinstance(row, PooledRow):
                tokens, page = length, FROM_TOKEN_TABLE - row.line
            else:
                tokens = shard_tokens(row.held, length if row.grows else row.length, PAGE_SIZE)
                first, page = first and row.grows, dict(row.held).get((length - 1) // PAGE_SIZE, NO_PAGE)
                slot = slot_of(row.held, length - 1, PAGE_SIZE) if row.arrives else -1
            needed += [-(-tokens // PAGE_SIZE)] if first else []
            renewed = step == 1 and isinstance(row, PooledRow) and tokens <= PAGE_SIZE
            expected.append([entries[index], tokens, page if first or renewed else NO_PAGE, slot])
        assert table.table.tolist() == expected and begun == needed
        sent = (ctypes.c_int32 * table.table.size).from_address(table.table_address)
        assert np.array(sent).tolist() == table.table.ravel().tolist()
