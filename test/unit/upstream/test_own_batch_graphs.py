"""Decode graphs where SGLang gathers no tokens (dense layers and the head of each instance by itself, experts behind DeepEP).

Every instance replays the graph of its own batch size. A sharded step needs all of them to replay one, with as many guest rows, and room
for its rows.
"""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.model_executor.runner.decode_cuda_graph_runner import DecodeCudaGraphRunner

from sglang_dcp.dataflow.reference import route_tables
from sglang_dcp.dataflow.step_mode import STOCK, Graph
from sglang_dcp.ledger.routes import route_word
from sglang_dcp.policy.split_limits import Layout
from sglang_dcp.upstream.layers import graphs as graph_modules
from sglang_dcp.upstream.layers.graphs import GraphEngine
from sglang_dcp.upstream.layers.peers import Place

CAPTURED, GUEST_ROWS = [1, 2, 4, 8], (2, 6)
LAYOUT = Layout(6, 3)
PLACES = [Place("host", "gpu", ("gpu",))] * LAYOUT.num_instances


def stock_graph(batches: list[int], rank: int, *, gathers: bool) -> int | None:
    """The batch size of the graph that SGLang's own runner replays on an instance; None where it runs none."""
    runner: Any = SimpleNamespace(
        captured_req_width=1,
        ragged_verify_mode=False,
        require_mlp_tp_gather=gathers,
        require_mlp_sync=True,
        enable_pdmux=False,
        enable_two_batch_overlap=False,
        disable_padding=False,
        is_encoder_decoder=False,
        max_bs=CAPTURED[-1],
        model_runner=SimpleNamespace(spec_algorithm=SimpleNamespace(is_ngram=lambda: False)),
        _max_dp_batch_size=DecodeCudaGraphRunner._max_dp_batch_size,
        _make_graph_key=lambda *args, **kwargs: None,
        _resolve_lora_variant=lambda batch: None,
    )
    counts = batches if gathers else [batches[rank]]
    batch = SimpleNamespace(
        batch_size=batches[rank],
        original_global_num_tokens_cpu=counts,
        can_run_decode_cuda_graph=True,
        replace_embeds=None,
        spec_info=None,
    )
    if not DecodeCudaGraphRunner.can_run_graph(runner, batch):
        return None
    return int(DecodeCudaGraphRunner._pad_to_bucket(max(counts), CAPTURED))


def random_step(rng: random.Random) -> tuple[list[int], list[list[tuple[int, ...]]]]:
    """Batch size of each instance, and the shards of its sharded rows."""
    most = rng.choice([2, 4, 9])
    batches = [rng.choice([0, 1, rng.randint(0, most)]) for _ in range(LAYOUT.num_instances)]
    shards = []
    for home, batch in enumerate(batches):
        group = LAYOUT.group(home)
        rows = rng.randint(0, min(batch, 3)) if rng.random() < 0.5 else 0
        shards.append([tuple(sorted({*rng.sample(group, rng.randint(1, 2)), rng.choice(group)})) for _ in range(rows)])
    return batches, [[row for row in rows if set(row) != {home}] for home, rows in enumerate(shards)]


def choices(monkeypatch: pytest.MonkeyPatch, batches: list[int], routes: list[list[int]]) -> list[Any]:
    """What each instance makes of the step."""
    monkeypatch.setattr(graph_modules.GraphStep, "of", lambda rows: None)
    busy = frozenset(rank for group in LAYOUT.groups if any(routes[home] for home in group) for rank in group)
    found = []
    for rank in range(LAYOUT.num_instances):
        engine = GraphEngine(GUEST_ROWS, PLACES, rank, LAYOUT, None)
        engine.max_home_rows = CAPTURED[-1]
        rows: Any = SimpleNamespace(routes_of_homes=routes, participant=SimpleNamespace(step=3, busy_ranks=busy, rank=rank))
        found.append(engine.choose_step(STOCK, rows, batches, steady=False))
    return found


@pytest.mark.parametrize("gathers", [False, True])
def test_all_instances_replay_or_none_and_every_row_has_its_place(monkeypatch: pytest.MonkeyPatch, gathers: bool) -> None:
    rng, as_graph, eager, sizes = random.Random(20), 0, 0, set()
    for _ in range(3000):
        batches, shards = random_step(rng)
        if not any(shards):
            continue
        routes = [[route_word(row, home, home, LAYOUT.group(home)) for row in rows] for home, rows in enumerate(shards)]
        modes = choices(monkeypatch, batches, routes)
        if None in modes:
            assert modes == [None] * LAYOUT.num_instances, "eager on all of them"
            eager += 1
            continue
        (guest_rows,) = {mode.guest_rows for mode in modes if isinstance(mode, Graph)}
        replayed = [stock_graph(batches, rank, gathers=gathers) for rank in range(LAYOUT.num_instances)]
        assert None not in replayed, (batches, "ours says a graph, SGLang runs none")
        assert len(set(replayed)) == 1 or not gathers
        for rank, (mode, size) in enumerate(zip(modes, replayed, strict=True)):
            if isinstance(mode, Graph):
                check_room(shards, batches, rank, int(size or 0), guest_rows)
        as_graph, sizes = as_graph + 1, sizes | {tuple(replayed)}
    assert as_graph > 500 and eager > 50
    assert gathers or any(len(set(replayed)) > 2 for replayed in sizes), "graphs of several sizes in one step"


def check_room(shards: list[list[tuple[int, ...]]], batches: list[int], rank: int, size: int, guest_rows: int) -> None:
    """The rows of an instance lie within those that its graph's attention kernel has: `size` of its own, `guest_rows` of others."""
    group = LAYOUT.group(rank)
    own = batches[rank] - len(shards[rank])
    inside = [[[group.index(shard) for shard in row] for row in shards[home]] for home in group]
    place = group.index(rank)
    inside[place] += [[place]] * own  # whom an instance attends alone, nobody else is told of
    tables = route_tables(inside, [[-1] * len(rows) for rows in inside], place)
    homes = [home for home, _ in tables.attention]
    assert homes.count(place) <= batches[rank] <= size and len(homes) - homes.count(place) <= guest_rows
    assert all(home == place for home in homes[len(homes) - homes.count(place) :]), "guests first: their slots follow from routes alone"


def test_what_another_instance_runs_besides_moves_no_slot() -> None:
    """Both ends of an exchange lay out their slots alike, whatever batch the other one has."""
    inside = [[[0, 1], [0, 2]], [[1, 2]], []]
    tails = [[-1] * len(rows) for rows in inside]
    alone = route_tables(inside, tails, 2)
    crowded = [[*rows, *[[home]] * extra] for home, (rows, extra) in enumerate(zip(inside, (5, 0, 3), strict=True))]
    beside = route_tables(crowded, [[-1] * len(rows) for rows in crowded], 2)
    assert beside.attention[: len(alone.attention)] == alone.attention and beside.give_back[: len(alone.give_back)] == alone.give_back


def test_an_instance_that_only_attends_guests_replays_the_smallest_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    batches, routes = [3, 0, 0, 5, 0, 0], [[route_word((0, 1), 0, 0, LAYOUT.group(0))], [], [], [], [], []]
    modes = choices(monkeypatch, batches, routes)
    assert [isinstance(mode, Graph) for mode in modes] == [True, True, True, False, False, False]
    assert [stock_graph(batches, rank, gathers=False) for rank in range(6)] == [4, 1, 1, 8, 1, 1]


def test_a_batch_beyond_all_graphs_makes_all_of_them_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang without a gather would run the others as graphs; a sharded step is one or the other everywhere."""
    batches, routes = [3, 0, 0, 9, 0, 0], [[route_word((0, 1), 0, 0, LAYOUT.group(0))], [], [], [], [], []]
    assert choices(monkeypatch, batches, routes) == [None] * 6
    assert [stock_graph(batches, rank, gathers=False) for rank in range(6)] == [4, 1, 1, None, 1, 1]
