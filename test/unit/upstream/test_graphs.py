"""Which graph a step runs as, and whether instances can reach each other's memory."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest

from sglang_dcp.dataflow.step_mode import Graph, GraphStep
from sglang_dcp.ledger.routes import MOST_INSTANCES, route_word, shard_mask, travelling_tail
from sglang_dcp.upstream.layers import graph_variants
from sglang_dcp.upstream.layers.graphs import GraphEngine, guest_row_grid
from sglang_dcp.upstream.layers.peers import Place, find_obstacle, num_sharing
from sglang_dcp.upstream.step import attached

PLACES = [Place("host", f"gpu{rank}", ("gpu0", "gpu1", "gpu2")) for rank in range(3)]


@pytest.mark.parametrize(("max_rows", "grid"), [(1, (1,)), (2, (1, 2)), (64, (16, 64)), (100, (25, 100))])
def test_grid(max_rows: int, grid: tuple[int, ...]) -> None:
    assert guest_row_grid(max_rows) == grid


def engine() -> GraphEngine:
    found = GraphEngine((2, 5), PLACES, 0, None)
    found.max_home_rows = 8
    return found


def test_the_smallest_graph_that_holds_every_instance() -> None:
    to_both = route_word((0, 1, 2), 0, 0, 3)
    to_one = route_word((0, 2), 2, 0, 3)
    assert engine().choose([[to_one], [], []], [1, 0, 0]) == 2
    assert engine().choose([[to_one] * 2 + [to_both], [], []], [3, 8, 1]) == 5
    assert engine().choose([[to_one] * 6, [], []], [6, 0, 0]) == 0
    assert engine().choose([[to_one], [], []], [1, 9, 0]) == 0


def test_labels_name_guest_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_variants, "process_graphs", engine)
    variants = graph_variants.add_graph_variants(None, None)
    assert variants.capture_labels == ("g0", "g2", "g5")
    assert variants.select(None) == "g0"
    mode = Graph(5, GraphStep(7, [], [], frozenset(), has_new_pooled=False))
    monkeypatch.setattr(attached, "_runtime", SimpleNamespace(mode=mode))
    assert variants.select(None) == "g5"
    monkeypatch.setattr(graph_variants, "process_graphs", lambda: None)
    assert graph_variants.add_graph_variants("stock's", None) == "stock's"


def test_routes() -> None:
    word = route_word((3, 0, 5), 5, 0, 8)
    assert shard_mask(word) == 0b101001 and travelling_tail(word) == 5
    assert travelling_tail(route_word((0, 2), 0, 0, 8)) == -1
    assert 0 < route_word(range(MOST_INSTANCES), 47, 0, MOST_INSTANCES) < 1 << 62
    assert route_word((0, 1), 1, 0, MOST_INSTANCES + 1) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"host": "other"}, "instances 0 and 2 run on different hosts"),
        ({"reachable": ("gpu2", "gpu0")}, "instance 2 cannot map the memory of instance 1's GPU"),
        ({"has_kernels": False}, "sgl-kernel-dcp is not installed where instance 2 runs"),
    ],
)
def test_obstacles(change: dict, message: str | None) -> None:
    assert find_obstacle([*PLACES[:2], dataclasses.replace(PLACES[2], **change)]) == message


def test_too_many_peers() -> None:
    assert find_obstacle([Place("host", "gpu0", ("gpu0",))] * 17) == "17 instances, the kernels serve 16"
    assert num_sharing([PLACES[0], PLACES[1], PLACES[0]], 2) == 2
