"""Requests join and leave: what the others keep is what looking at all of them finds, and what other homes are told."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from sglang_dcp.dataflow.graph.rows_of_step import RowsOfStep
from sglang_dcp.dataflow.graph.table_rows import TableRows
from sglang_dcp.ledger.kept_runs import kept_runs
from sglang_dcp.ledger.messages import Row, RowColumns
from sglang_dcp.ledger.page_ids import Page
from sglang_dcp.ledger.participant import Participant
from sglang_dcp.ledger.routes import route_word
from sglang_dcp.ledger.row_table import advance
from sglang_dcp.upstream.step.own_batch import OwnBatch
from test.unit.upstream.test_own_batch import PAGE_SIZE, make_participant, request

HOME, GUEST_HOMES = 0, (1, 2)


class Batches:
    """A home's decode batches, and what two other homes tell, step by step."""

    def __init__(self, seed: int) -> None:
        self.rng, self.participant = random.Random(seed), make_participant()
        self.reqs: list[Any] = []
        self.parked: list[Any] = []
        self.guests: dict[int, list[Row]] = {home: [] for home in GUEST_HOMES}
        self.num_guests = 0

    def join(self) -> None:
        rng, length = self.rng, self.rng.randint(1, 3 * PAGE_SIZE)
        kind = rng.choice(["local", "home", "spread", "away"])
        owners = {"local": None, "home": [0] * 9, "spread": rng.choices(range(3), k=9), "away": [1] * 9}[kind]
        req = request(self.participant, owners, length)
        req.kv.req_pool_idx = rng.randrange(1000)
        self.reqs.append(req)

    def change(self, batch: OwnBatch) -> None:
        rng = self.rng
        gone = [req for req in self.reqs if rng.random() < 0.15]
        self.reqs = [req for req in self.reqs if req not in gone]
        back, self.parked = self.parked, [req for req in gone if rng.random() < 0.3]
        self.reqs += back
        for _ in range(rng.choice([0, 0, 1, 2])):
            self.join()
        if rng.random() < 0.1:
            rng.shuffle(self.reqs)
        local = [req for req in self.reqs if req.dyncp is None]
        if local and rng.random() < 0.2:
            self.adopt(rng.choice(local), batch)

    def adopt(self, req: Any, batch: OwnBatch) -> None:
        homes = self.participant.homes
        req.dyncp = homes.open(0)
        first = -(-req.kv.kv_allocated_len // PAGE_SIZE)
        pages = [Page(HOME if index < first else self.rng.randrange(3), 1 + 100 * req.dyncp.handle + index) for index in range(9)]
        homes.adopt(req.dyncp, pages, 0)
        batch.note_taken_over()

    def tell(self) -> None:
        """What finish_step makes of the other homes' messages."""
        rng, part = self.rng, self.participant
        for home in GUEST_HOMES:
            rows = [Row(row.handle, row.prefix_len + 1, 1, row.route) for row in self.guests[home]]
            if rng.random() < 0.7:
                self.guests[home] = rows
                part.rows_of[home].advance()
                continue
            rows = [row for row in rows if rng.random() < 0.8]
            rows = [Row(row.handle, row.prefix_len, 1, self.route(home) if rng.random() < 0.1 else row.route) for row in rows]
            for _ in range(rng.choice([0, 1, 2])):
                self.num_guests += 1
                if rng.random() < 0.9:
                    part.guests.lend(home, self.num_guests, 0, [self.num_guests])
                rows.insert(rng.randint(0, len(rows)), Row(self.num_guests, rng.randint(1, 90), 1, self.route(home)))
            self.guests[home] = rows
            part.rows_of[home].tell(RowColumns.of(rows))
        part.step += 1

    def route(self, home: int) -> int:
        shards = self.rng.sample(range(3), self.rng.randint(1, 3))
        return route_word(shards, self.rng.choice(shards), home, range(3))


def take(batch: OwnBatch, reqs: list[Any]) -> None:
    lengths = torch.tensor([req.kv.kv_allocated_len for req in reqs], dtype=torch.int64)
    if batch._participant.step % 3:  # some are asked about ahead, as `secure` and `allocate` do
        due = [index for index, length in enumerate(lengths.tolist()) if length % PAGE_SIZE == 0]
        assert list(batch.to_secure(reqs, lengths, home_is_full=False)) == due
        assert list(batch.beginning_page(reqs, lengths + 1)) == due
    for req in reqs:
        req.kv.kv_allocated_len += 1
    batch.take_decode(list(reqs), lengths + 1)


def check_batch(batch: OwnBatch, afresh: OwnBatch, told: RowColumns) -> RowColumns:
    """Returns the sharded rows."""
    assert batch.routes == afresh.routes and list(batch.routes) == sorted(batch.routes)
    assert batch.spans == afresh.spans and batch._managed in (None, afresh._managed)
    rows = batch.sharded_rows()
    assert rows == afresh.sharded_rows()
    assert batch.news() == rows or (batch.news() is None and rows == advance(told))
    return rows


def check_tables(participant: Participant, batch: OwnBatch, made: tuple[list[Any], TableRows], before: TableRows | None) -> None:
    """Against rows made by somebody who saw nothing before; and what is said to have stayed has."""
    afresh = OwnBatch(participant)
    afresh.take_decode(list(batch.rows.keys), torch.tensor([before + 1 for _, before, _ in batch.spans], dtype=torch.int64))
    words, rows = RowsOfStep(participant).make(afresh)
    assert [word.tolist() for word in made[0]] == [word.tolist() for word in words]
    assert list(made[1]) == list(rows)
    if before is None or made[1].came_from is not before.name:
        return
    for old, new, size in made[1].runs:
        for was, now in zip(before[old : old + size], made[1][new : new + size], strict=True):
            assert was._replace(length=now.length) == now and now.length - was.length == made[1].step - before.step


@pytest.mark.parametrize("seed", range(8))
def test_batches_that_follow_each_other(seed: int) -> None:
    """Some prefill in between, some steps run as no graph, so that nobody asks for the tables' rows."""
    batches = Batches(seed)
    participant, rng, told, before = batches.participant, batches.rng, RowColumns([], [], [], []), None
    batch, maker, num_kept = OwnBatch(participant), RowsOfStep(participant), 0
    for _ in range(300):
        if rng.random() < 0.4:
            batches.change(batch)
        batches.reqs = [req for req in batches.reqs if req.kv.kv_allocated_len < 8 * PAGE_SIZE][:20]
        if rng.random() < 0.05 and batches.reqs:
            batch.take_extend([(req, 0, req.kv.kv_allocated_len) for req in batches.reqs[-2:]])
            told = batch.sharded_rows()
            assert batch.news() == told
        else:
            take(batch, batches.reqs)
            afresh = OwnBatch(participant)
            afresh.take_decode(batches.reqs, torch.tensor([req.kv.kv_allocated_len for req in batches.reqs]))
            told = check_batch(batch, afresh, told)
        batches.tell()
        if batch._rows is not None and rng.random() < 0.9:
            made = maker.make(batch)
            check_tables(participant, batch, made, before)
            before = made[1]
            num_kept += sum(size for _, _, size in before.runs)
    assert num_kept > 1000


def test_a_name_that_comes_again_is_another_request() -> None:
    """A row that left in this step and one that joins in it are told apart by the object, though nothing else differs."""
    participant = make_participant()
    first, second = (request(participant, None, 20) for _ in range(2))
    batch = OwnBatch(participant)
    take(batch, [first])
    second.kv.kv_allocated_len = first.kv.kv_allocated_len
    take(batch, [second])
    assert batch.runs == [] and kept_runs([first], [second]) == [] and batch.rows.keys == [second]
