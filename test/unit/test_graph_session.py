"""Whole sessions whose decode steps run as graphs do: from the tables' input alone (routes, page lines, K/V slots), played in plain torch.

What the kernels of sgl-kernel-dcp do with that input is `reference.route_tables`; test/gpu and sgl-kernel-dcp/tests hold them to it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from sglang_dcp.dataflow.contracts import NewKV, PartialState
from sglang_dcp.dataflow.graph.route_words import TAIL_SHIFT, guests_per_instance
from sglang_dcp.dataflow.graph.static_tables import FROM_TOKEN_TABLE, PageLines
from sglang_dcp.dataflow.graph.tables_ahead import NO_PAGE
from sglang_dcp.dataflow.merge import merge_partial_states
from sglang_dcp.dataflow.reference import RouteTables, partial_attention, route_tables
from sglang_dcp.dataflow.step_mode import STOCK, Graph, StepMode, Stock
from sglang_dcp.upstream.layers.graphs import GraphEngine
from sglang_dcp.upstream.layers.peers import Place
from test.unit.test_decode_session import CASES, HEADS, Session, drive, take_turns

NUM_ENTRIES, WIDTH = 24, 40


@dataclass
class Side:
    """One instance's part of a step: its input, and what its own words say about every home."""

    rows: np.ndarray
    tables: RouteTables
    queries: torch.Tensor
    new_kv: NewKV


class GraphSession(Session):
    """A `Session` whose steps without a prefill take the graphs' path."""

    def __init__(self, *args: int, latent: bool, num_nodes: int = 1) -> None:
        super().__init__(*args, latent=latent, num_nodes=num_nodes)
        self.lines = [PageLines(NUM_ENTRIES, WIDTH, self.page_size) for _ in range(self.num_instances)]
        self.page_table = [np.full((NUM_ENTRIES, WIDTH), -1) for _ in range(self.num_instances)]
        place = Place("host", "gpu", ("gpu",))
        places = [place] * self.num_instances
        self.engines = [GraphEngine((1000,), places, rank, self.layout, None) for rank in range(self.num_instances)]
        for engine in self.engines:
            engine.max_home_rows = 1000
        self.num_graph_steps = self.num_travelling = self.num_written = self.num_advances = self.num_groups_beside = 0

    def run_batches(self) -> None:
        instances = [home.participant for home in self.homes]
        extends = any(num_new > 1 for home in self.homes for _, _, num_new in home.batch)
        if extends or not instances[0].num_sharded_rows:
            for home in self.homes:
                home.runtime.mode = STOCK
            super().run_batches()
            return
        self.num_graph_steps += 1
        for rank, home in enumerate(self.homes):
            home.runtime.mode = self.choose(rank)
        for group in self.layout.groups:
            modes = {type(self.homes[rank].runtime.mode) for rank in group}
            assert modes == {Graph if group.start in instances[0].busy_ranks else Stock}
            if modes == {Graph}:
                self.run_graph(group)
            else:
                self.num_groups_beside += 1
                self.run_eagerly(group)

    def choose(self, rank: int) -> StepMode:
        runtime, sizes = self.homes[rank].runtime, [len(other.batch) for other in self.homes]
        steady = runtime.participant.rows_steady and runtime.own_batch.steady
        mode = self.engines[rank].choose_step(runtime.mode, runtime.rows, sizes, steady=steady)
        assert mode is not None
        return mode

    def run_graph(self, group: range) -> None:
        """One exchange group's layer. Whatever its tables name is a place in the group."""
        homes, sides = [self.homes[rank] for rank in group], [self.prepare(rank, group) for rank in group]
        self.check_guests(sides, group)
        self.write_kv(sides, group)
        returned = self.attend(sides, group)
        for home, side, output in zip(homes, sides, self.merge(sides, returned), strict=True):
            self.compare(home, side.queries, output)

    def prepare(self, rank: int, group: range) -> Side:
        home = self.homes[rank]
        mode, lines, table = home.runtime.mode, self.lines[rank], self.page_table[rank]
        assert isinstance(mode, Graph)
        step = mode.step
        self.num_advances += step.is_advance
        if step.is_advance:
            lines.advance(step.step)
            given = lines.renewal
        else:
            given = lines.fill(step.step, step.rows)
        if given is not None:
            places, pages = given.writes
            table.reshape(-1)[places] = pages
            self.num_written += len(places)
            for entry, line in given.copies.T:
                pages = home.rows_by_slot[line].listed_pages[: given.copy_pages]
                table[entry, : len(pages)] = pages
        for entry, tokens, new_page, _ in lines.table.tolist():
            if new_page != NO_PAGE:
                last = (tokens - 1) // self.page_size
                table[entry, last] = new_page if new_page >= 0 else home.rows_by_slot[FROM_TOKEN_TABLE - new_page].listed_pages[last]
                self.num_written += 1
        masks = [[[s for s in range(len(group)) if word >> s & 1] for word in words.tolist()] for words in step.words]
        tails = [[(word >> TAIL_SHIFT) - 1 for word in words.tolist()] for words in step.words]
        if home.batch:
            queries, new_kv = self.tokens_of(home)
        else:
            none = self.randn(0, self.kv_heads, self.qk_dim)
            queries, new_kv = self.randn(0, HEADS, self.qk_dim), NewKV(none, none[..., : self.v_dim], self.latent)
        return Side(lines.table.copy(), route_tables(masks, tails, group.index(rank)), queries, new_kv)

    def check_guests(self, sides: list[Side], group: range) -> None:
        routes = [[row.route for row in rows] for rows in self.homes[0].participant.rows_of]
        found = [sum(home != place for home, _ in side.tables.attention) for place, side in enumerate(sides)]
        assert guests_per_instance(routes, self.layout.groups)[group.start : group.stop] == found

    def write_kv(self, sides: list[Side], group: range) -> None:
        """New tokens' K/V: at home by the request's page, elsewhere where the tail's row says."""
        for place, side in enumerate(sides):
            for row, (req, prefix_len, _) in enumerate(self.homes[group[place]].batch):
                target = side.tables.kv_send[row]
                if target is None:
                    index, offset = divmod(prefix_len, self.page_size)
                    page = req.pages[index] if req.dyncp is None else req.dyncp.pages[index].number
                    owner, slot = place, page * self.page_size + offset
                else:
                    owner, arrival = target
                    arriving = [int(line[3]) for line in sides[owner].rows if line[3] >= 0]
                    slot = arriving[arrival]
                    self.num_travelling += 1
                one = slice(row, row + 1)
                self.caches[group[owner]].write(torch.tensor([slot]), NewKV(side.new_kv.keys[one], side.new_kv.values[one], self.latent))
        for side in sides:
            assert len(side.tables.kv_receive) == sum(line[3] >= 0 for line in side.rows)

    def attend(self, sides: list[Side], group: range) -> list[list[PartialState]]:
        """Partial state of every attention row of every instance."""
        results = []
        for place, side in enumerate(sides):
            keys, values = self.caches[group[place]].keys_and_values()
            states = []
            for (home, _), (entry, tokens, _, _) in zip(side.tables.attention, side.rows.tolist(), strict=True):
                query = self.received(sides[home], place, len(states))
                pages = self.page_table[group[place]][entry, : -(-tokens // self.page_size)]
                assert (pages > 0).all(), "a page that was never filled"
                slots = torch.from_numpy((pages[:, None] * self.page_size + np.arange(self.page_size)).ravel()[:tokens])
                states.append(partial_attention(query, keys[slots], values[slots], scale=self.qk_dim**-0.5))
            results.append(states)
        return results

    @staticmethod
    def received(home: Side, rank: int, slot: int) -> torch.Tensor:
        """The query that the home sends to this slot of instance `rank`: one of its rows, as its own tables have it."""
        (row,) = [row for row, targets in enumerate(home.tables.send) if (rank, slot) in targets]
        return home.queries[row : row + 1]

    def merge(self, sides: list[Side], states: list[list[PartialState]]) -> list[torch.Tensor]:
        """Partial results travel to the return slots of their homes, where the merge lists find them."""
        slots: list[dict[int, PartialState]] = [{} for _ in sides]
        for rank, side in enumerate(sides):
            for state, target in zip(states[rank], side.tables.give_back, strict=True):
                if target is not None:
                    assert target[1] not in slots[target[0]]
                    slots[target[0]][target[1]] = state
        outputs = []
        for rank, side in enumerate(sides):
            rows = []
            for sources in side.tables.merge:
                parts = [states[rank][slot] if shard == rank else slots[rank][slot] for shard, slot in sources]
                merged = merge_partial_states(torch.stack([p.output for p in parts]), torch.stack([p.lse for p in parts]))
                rows.append(merged.output)
            outputs.append(torch.cat(rows) if rows else torch.zeros(0, HEADS, self.v_dim))
        return outputs


@pytest.mark.parametrize(("num_instances", "num_pages", "page_size", "latent"), CASES)
def test_session_of_random_requests(num_instances, num_pages, page_size, latent):
    session = GraphSession(5, num_instances, num_pages, page_size, latent=latent)
    drive(session)
    assert session.num_graph_steps > 60 and session.num_travelling > 10 and session.num_rows > 30
    assert session.num_advances > 30


@pytest.mark.parametrize("latent", [False, True])
def test_nodes_replay_each_by_itself(latent):
    """Two nodes of two; a node without sharded rows replays SGLang's own graph beside the other."""
    session = GraphSession(9, 4, 10, 8, latent=latent, num_nodes=2)
    drive(session)
    assert session.num_graph_steps > 60 and session.num_travelling > 10 and session.num_groups_beside > 20


def test_pages_are_reused_right_after_a_release():
    session = GraphSession(4, 2, 6, 4, latent=False)
    take_turns(session)
    assert session.num_graph_steps > 10


def test_a_steady_request_writes_its_pages_once():
    """A step sends new pages only: over a session each page of a long request is written about once per shard."""
    session = GraphSession(6, 2, 24, 4, latent=False)
    session.arrive(0, 60, 30, (1, 0))
    session.drain(2_000)
    session.close()
    assert session.num_graph_steps > 25 and session.num_advances > 30
    assert session.num_written <= 24
