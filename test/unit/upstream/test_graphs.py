"""Which graph a step runs as, and whether instances can reach each other's memory."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest

from sglang_dcp.config import DynCpConfig
from sglang_dcp.dataflow.graph.route_words import guests_per_instance
from sglang_dcp.dataflow.step_mode import STOCK, Graph, GraphStep
from sglang_dcp.ledger.routes import MOST_INSTANCES, route_word, shard_mask, travelling_tail
from sglang_dcp.policy.split_limits import Layout
from sglang_dcp.upstream.layers import graph_variants
from sglang_dcp.upstream.layers import graphs as graph_modules
from sglang_dcp.upstream.layers.graphs import GraphEngine, GraphError, guest_row_grid
from sglang_dcp.upstream.layers.peers import Place, find_obstacle, num_sharing
from sglang_dcp.upstream.step import attached

PLACES = [Place("host", f"gpu{rank}", ("gpu0", "gpu1", "gpu2")) for rank in range(3)]


@pytest.mark.parametrize(("max_rows", "grid"), [(1, (1,)), (2, (1, 2)), (64, (16, 64)), (100, (25, 100))])
def test_grid(max_rows: int, grid: tuple[int, ...]) -> None:
    assert guest_row_grid(max_rows) == grid


def engine() -> GraphEngine:
    found = GraphEngine((2, 5), PLACES, 0, Layout(3, 3), None)
    found.max_home_rows = 8
    return found


def test_the_smallest_graph_that_holds_every_instance() -> None:
    to_both = route_word((0, 1, 2), 0, 0, range(3))
    to_one = route_word((0, 2), 2, 0, range(3))
    assert engine().choose([[to_one], [], []], [1, 0, 0]) == 2
    assert engine().choose([[to_one] * 2 + [to_both], [], []], [3, 8, 1]) == 5
    assert engine().choose([[to_one] * 6, [], []], [6, 0, 0]) == 0
    assert engine().choose([[to_one], [], []], [1, 9, 0]) == 0


class Exchange:
    """Notes whose memory is opened."""

    def __init__(self, rank: int) -> None:
        self.rank, self.opened = rank, None

    def ipc_handle(self) -> str:
        return f"handle {self.rank}"

    def connect_processes(self, handles: list[str]) -> None:
        self.opened = handles


@pytest.mark.parametrize(("crosses", "opened"), [(False, [4, 5]), (True, [0, 1, 2, 3, 4, 5])])
def test_memory_is_opened_inside_the_node_alone(monkeypatch: pytest.MonkeyPatch, crosses: bool, opened: list[int]) -> None:
    found = GraphEngine((2, 5), PLACES * 2, 4, Layout(6, 2, crosses), None)
    found.attention = SimpleNamespace(exchange=Exchange(4))
    monkeypatch.setattr(graph_modules, "tell_everybody", lambda own, group: [f"handle {rank}" for rank in range(6)])
    found.connect()
    assert found.attention.exchange.opened == [f"handle {rank}" for rank in opened]


def test_memory_is_opened_of_the_own_slice_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four instances of two slices, in two nodes: the second slice of the last instance."""
    found = GraphEngine((2, 5), PLACES * 3, 7, Layout(4, 2), None, slices=2)
    found.attention = SimpleNamespace(exchange=Exchange(7))
    monkeypatch.setattr(graph_modules, "tell_everybody", lambda own, group: [f"handle {rank}" for rank in range(8)])
    found.connect()
    assert found.rank == 3 and found.attention.exchange.opened == ["handle 5", "handle 7"]


def test_all_nodes_take_one_graph_and_one_without_rows_takes_stock_s() -> None:
    """Four guests on one instance of the last node: every instance of every node says the same of the step."""
    layout, route = Layout(6, 2), route_word((4, 5), 5, 4, range(4, 6))
    routes = [[], [], [], [], [route] * 4, []]
    rows = SimpleNamespace(routes_of_homes=routes, participant=SimpleNamespace(step=7, busy_ranks=frozenset((4, 5)), rank=0))
    for rank in range(4):
        found = GraphEngine((2, 5), PLACES * 2, rank, layout, None)
        found.max_home_rows = 8
        assert found.choose(routes, [1] * 6) == 5
        assert found.choose_step(STOCK, rows, [1] * 6, steady=True) is STOCK  # type: ignore[arg-type]
        assert found.choose_step(STOCK, rows, [9] + [1] * 5, steady=True) is None, "beyond every graph, for all"  # type: ignore[arg-type]


def test_labels_name_guest_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_variants, "process_graphs", engine)
    variants = graph_variants.add_graph_variants(None, None)
    assert variants.capture_labels == ("g0", "g2", "g5")
    assert variants.select(None) == "g0"
    mode = Graph(5, GraphStep(7, [], []))
    monkeypatch.setattr(attached, "_runtime", SimpleNamespace(mode=mode))
    assert variants.select(None) == "g5"
    monkeypatch.setattr(graph_variants, "process_graphs", lambda: None)
    assert graph_variants.add_graph_variants("stock's", None) == "stock's"


def test_routes() -> None:
    word = route_word((3, 0, 5), 5, 0, range(8))
    assert shard_mask(word) == 0b101001 and travelling_tail(word) == 5
    assert travelling_tail(route_word((0, 2), 0, 0, range(8))) == -1
    assert 0 < route_word(range(MOST_INSTANCES), 47, 0, range(MOST_INSTANCES)) < 1 << 62
    assert route_word((0, 1), 1, 0, range(MOST_INSTANCES + 1)) == 0


def test_routes_follow_the_node_and_not_the_cluster() -> None:
    """The last node of 72 instances; its routes are those of the first. A shard of another node is an error."""
    for node_size in (8, 12):
        last = range(72 - node_size, 72)
        first = route_word((1, 0, 3), 3, 0, range(node_size))
        assert route_word((last[1], last[0], last[3]), last[3], last[0], last) == first > 0
        counts = guests_per_instance([[]] * (72 - node_size) + [[first]] + [[]] * (node_size - 1), Layout(72, node_size).groups)
        assert [rank for rank, count in enumerate(counts) if count] == [last[1], last[3]]
        with pytest.raises(ValueError, match="not in range"):
            route_word((0, last[0]), last[0], last[0], last)


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
    assert find_obstacle([*PLACES[:2], dataclasses.replace(PLACES[2], **change)], [range(3)]) == message


def test_hosts_meet_at_the_border_of_a_group() -> None:
    """Two hosts of two GPUs each: no obstacle between nodes, one where requests may cross them."""
    places = [Place(host, f"{host} {gpu}", (f"{host} 0", f"{host} 1")) for host in ("a", "b") for gpu in range(2)]
    assert find_obstacle(places, Layout(4, 2).groups) is None
    assert find_obstacle(places, Layout(4, 2, crosses=True).groups) == "instances 0 and 2 run on different hosts"
    places[3] = dataclasses.replace(places[3], has_kernels=False)
    assert find_obstacle(places, Layout(4, 2).groups) == "sgl-kernel-dcp is not installed where instance 3 runs"


@pytest.mark.parametrize(
    ("transport", "slices", "ended"),
    [
        ("auto", 1, None),
        ("peer", 1, "^--dyncp-transport peer: sgl-kernel-dcp is not"),
        ("auto", 2, "^--dyncp-transport auto with attention TP 2, which needs peer memory: sgl-kernel-dcp is not"),
    ],
)
def test_without_peer_memory_steps_are_eager_or_the_start_ends(
    monkeypatch: pytest.MonkeyPatch, transport: str, slices: int, ended: str | None
) -> None:
    """On a GPU slices ran with graphs over peer memory alone."""
    from sglang.srt import runtime_context

    parallel = SimpleNamespace(tp_group=SimpleNamespace(cpu_group=None), num_dp_ranks=2, attn_tp_size=slices, tp_rank=0)
    place = dataclasses.replace(PLACES[0], has_kernels=False)
    monkeypatch.setattr(runtime_context, "get_parallel", lambda: parallel)
    monkeypatch.setattr(graph_variants.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(graph_variants.DynCpConfig, "from_environment", lambda: DynCpConfig(transport=transport))
    monkeypatch.setattr(graph_variants, "own_place", lambda: place)
    monkeypatch.setattr(graph_variants, "tell_everybody", lambda own, group: [own] * 2 * slices)
    make = graph_variants.process_graphs.__wrapped__
    if ended is None:
        assert make() is None
        return
    with pytest.raises(GraphError, match=ended):
        make()


def test_too_many_peers() -> None:
    places = [Place("host", "gpu0", ("gpu0",))] * 34
    assert find_obstacle(places[:17], [range(17)]) == "17 instances exchange rows, the kernels serve 16 (--dyncp-node-size)"
    assert find_obstacle(places, [range(16), range(16, 32), range(32, 34)]) is None
    assert num_sharing([PLACES[0], PLACES[1], PLACES[0]], 2) == 2
