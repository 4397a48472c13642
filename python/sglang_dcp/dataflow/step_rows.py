"""The rows of one step as this instance attends them: what a plan (eager) and the tables of a graph are both made from."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from sglang_dcp.dataflow.contracts import GuestRow, HomeRow, StepPlan
from sglang_dcp.dataflow.graph.rows_of_step import DecodeBatch, RowsOfStep
from sglang_dcp.dataflow.graph.table_rows import TableRows
from sglang_dcp.dataflow.step_plan import asks, build_step_plan, holds_active_page
from sglang_dcp.ledger.homes import HomeRequest
from sglang_dcp.ledger.participant import Participant


class Request(Protocol):
    """What the rows need of a request: kv.req_pool_idx is its line of the token table, dyncp its place in the ledger, None for a local
    one."""

    kv: Any
    dyncp: HomeRequest | None


Span = tuple[Any, int, int]
"""(Request, prefix_len, num_new), in token order."""


class Batch(DecodeBatch, Protocol):
    """The own batch of a step. routes: of the sharded rows, by place in the batch. rows: of a decode step, its requests and the tokens of
    each with the new one; version, runs: what changed of them (OwnBatch)."""

    @property
    def spans(self) -> Sequence[Span]: ...


@dataclass(slots=True, eq=False)
class StepRows:
    """The own batch, and the rows of other homes as the participant knows them: those of the step that both were told of last."""

    participant: Participant
    batch: Batch
    _tables: RowsOfStep = field(init=False)

    def __post_init__(self) -> None:
        self._tables = RowsOfStep(self.participant)

    @property
    def routes_of_homes(self) -> list[list[int]]:
        """By home: the routes of its sharded rows, each by places in the home's exchange group. All instances know them alike."""
        return [table.routes for table in self.participant.rows_of]

    def leaves_node(self) -> bool:
        """Whether a row of this instance, or a guest's, is shared with an instance of another node."""
        participant, layout = self.participant, self.participant.limits.layout
        if not layout.crosses:
            return False
        near = layout.members(participant.rank)
        spans = self.batch.spans
        if any(shard not in near for index in self.batch.routes for shard in spans[index][0].dyncp.shards):
            return True
        far = ((home, row) for home, rows in enumerate(participant.rows_of) if home not in near for row in rows)
        return any(participant.guests.pages_of(home, row.handle) for home, row in far)

    # ---- for a step of any shape

    def home_rows(self, local_pages: Iterable[np.ndarray]) -> list[HomeRow]:
        """Every request of the own batch, sharded or not. local_pages: page numbers of each local one, in order."""
        rows, start, pages, rank = [], 0, iter(local_pages), self.participant.rank
        for req, prefix_len, num_new in self.batch.spans:
            if req.dyncp is not None:
                rows.append(HomeRow(start, num_new, prefix_len, *req.dyncp.page_arrays()))
            else:
                numbers = next(pages)
                rows.append(HomeRow(start, num_new, prefix_len, np.full(len(numbers), rank, dtype=np.int64), numbers))
            start += num_new
        return rows

    def guest_rows(self) -> list[GuestRow]:
        """Rows of other homes that have pages here, by home and in the order of its batch."""
        participant, found = self.participant, []
        for home in participant.group:
            if home == participant.rank:
                continue
            for row in participant.rows_of[home]:
                held = participant.guests.pages_of(home, row.handle)
                if held and holds_active_page(held[0][0], participant.page_size, row.prefix_len + row.num_new):
                    found.append(GuestRow(home, row.num_new, row.prefix_len, *participant.guests.arrays_of(home, row.handle)))
        return found

    def build_plan(self, home_rows: Sequence[HomeRow], num_tokens: int, window: int | None = None) -> StepPlan:
        """num_tokens: of the own batch, padding included. window: of the layers that the plan is for."""
        part = self.participant
        facts = part.step, part.rank, part.group, part.page_size
        plan = build_step_plan(*facts, num_tokens, home_rows, self.guest_rows(), window)
        # From the rows of all homes of the group, which its instances know alike: a collective may depend on nothing else.
        anybody_asks = any(asks(row.num_new, row.prefix_len) for home in part.group for row in part.rows_of[home])
        return dataclasses.replace(plan, anybody_asks=anybody_asks)

    # ---- for a step of decodes that runs as a graph

    def table_rows(self) -> tuple[list[np.ndarray], TableRows]:
        """Route words of every home of the exchange group, and this instance's attention rows (guests by home, own rows last)."""
        return self._tables.make(self.batch)
