"""Dispatch, return and merge with N instances as streams of one process, against the oracle."""

from __future__ import annotations

import random

import pytest
import torch
from sgl_kernel_dcp import PHASE_RECEIVE, PHASE_SEND, ExchangeShape, RowLine, StepMessage, TableShape, launch_together

from sglang_dcp.dataflow.reference import route_tables
from testing.kernels.device_group import NUM_ENTRIES, NUM_SLOTS, DeviceGroup, prepare_step
from testing.kernels.random_steps import PATTERNS, random_messages

pytestmark = pytest.mark.gpu

SMALL = TableShape(4, 6, 16, 8, 256, 16, 16)
ROWS_UP_TO_48 = TableShape(4, 24, 48, 24, 512, 16, 16)
SHAPES = {
    "gqa": (ROWS_UP_TO_48, ExchangeShape(64, 128, 128, 1024, 96), 0),
    "mla": (ROWS_UP_TO_48, ExchangeShape(128, 576, 512, 576, 96), 64),
    "mla_before_absorption": (ROWS_UP_TO_48, ExchangeShape(128, 192, 128, 576, 96), 64),
    "short_pieces": (TableShape(3, 5, 9, 5, 64, 8, 4), ExchangeShape(40, 192, 128, 64, 16), 0),
    "one_head": (TableShape(2, 3, 4, 2, 64, 8, 4), ExchangeShape(1, 64, 64, 16, 8), 8),
    "sixteen_instances": (TableShape(16, 4, 20, 8, 64, 8, 4), ExchangeShape(8, 128, 128, 256, 64), 0),
    "alone": (TableShape(1, 4, 4, 1, 64, 8, 4), ExchangeShape(8, 128, 128, 256, 4), 0),
}


def messages_for(group: DeviceGroup, seed: int, pattern: str) -> list[StepMessage]:
    return random_messages(random.Random(seed), group.table_shape, NUM_ENTRIES, NUM_SLOTS, pattern)


def check(group: DeviceGroup, step) -> None:
    assert group.violations(step).tolist() == [0, 0, 0, 0, 0]
    assert group.silent() == [{}] * group.num_instances


@pytest.mark.parametrize("name", SHAPES)
def test_exchange_equals_the_oracle(library, name: str) -> None:
    table_shape, shape, rope = SHAPES[name]
    group = DeviceGroup(table_shape, shape, rope_dim=rope)
    for seed in range(3):
        for pattern in PATTERNS:
            step = prepare_step(messages_for(group, seed, pattern), group)
            group.randomise()
            group.load(step)
            group.exchange(layers=1 + seed)
            check(group, step)
    group.close()


def test_ten_thousand_rounds_with_random_tables(library) -> None:
    group = DeviceGroup(SMALL, ExchangeShape(16, 64, 64, 64, 24), rope_dim=16)
    rng = random.Random(0)
    steps = [prepare_step(messages_for(group, seed, PATTERNS[seed % len(PATTERNS)]), group) for seed in range(300)]
    total = torch.zeros(5, dtype=torch.int64, device="cuda:0")
    for round_number in range(10_000):
        step = rng.choice(steps)
        if round_number % 4 == 0:
            group.query.normal_()
        group.merged.fill_(float("nan"))
        group.merged_lse.fill_(float("nan"))
        group.pool.fill_(-7.0)
        if round_number % 16 == 0:
            group.randomise()
        group.load(step)
        group.exchange()
        total += group.violations(step)
        if round_number % 500 == 499:
            assert total.tolist() == [0, 0, 0, 0, 0], f"by round {round_number}"
    assert group.silent() == [{}] * 4
    group.close()


def test_one_graph_of_an_odd_number_of_layers_follows_the_steps(library) -> None:
    group = DeviceGroup(SMALL, ExchangeShape(64, 128, 128, 1024, 24))
    first = prepare_step(messages_for(group, 0, "mixed"), group)
    group.randomise()
    group.load(first)
    group.exchange(layers=3)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        group.exchange(layers=3)
    for seed in range(40):
        step = prepare_step(messages_for(group, seed, PATTERNS[seed % len(PATTERNS)]), group)
        group.randomise()
        group.load(step)
        graph.replay()
        check(group, step)
    group.close()


def test_send_and_receive_may_be_apart(library) -> None:
    group = DeviceGroup(SMALL, ExchangeShape(64, 128, 128, 1024, 24))
    step = prepare_step(messages_for(group, 3, "mixed"), group)
    group.randomise()
    group.load(step)
    for tables in group.tables:
        tables.build()
    # One stream for all: no receive could end unless every send came before it.
    for action in (group.dispatch, group.return_merge):
        for phase in (PHASE_SEND, PHASE_RECEIVE):
            for rank in range(group.num_instances):
                action(rank, phases=phase)
        for rank in range(group.num_instances) if action == group.dispatch else ():
            group.attend(rank)
    check(group, step)
    group.close()


@pytest.mark.parametrize("name", ["gqa", "mla", "short_pieces", "alone"])
def test_instances_may_share_a_launch(library, name: str) -> None:
    table_shape, shape, rope = SHAPES[name]
    group = DeviceGroup(table_shape, shape, rope_dim=rope)
    ranks = range(group.num_instances)
    for seed in range(3):
        for pattern in PATTERNS:
            step = prepare_step(messages_for(group, seed, pattern), group)
            group.randomise()
            group.load(step)
            for tables in group.tables:
                tables.build()
            for _ in range(3):
                with launch_together(group.exchanges[0]):
                    for rank in ranks:
                        group.dispatch(rank)
                for rank in ranks:
                    group.attend(rank)
                with launch_together(group.exchanges[0]):
                    for rank in ranks:
                        group.return_merge(rank)
            check(group, step)
    with pytest.raises(ValueError, match="one kind"), launch_together(group.exchanges[0]):
        group.dispatch(0)
        group.return_merge(0)
    group.close()


def test_a_silent_peer_is_masked_and_reported(library) -> None:
    """Instance 2 never takes part: rows it should attend merge without it, and the rest stays right, exchange after exchange."""
    group = DeviceGroup(TableShape(3, 4, 12, 4, 64, 8, 4), ExchangeShape(16, 128, 128, 256, 12), wait_limit_seconds=0.3)
    routes = [[[0, 1, 2], [2], [0], [1, 2]], [[0, 1], [1, 2]], [[0, 2], [1]]]
    tails = [[1, -1, -1, 2], [0, -1], [0, -1]]
    messages = []
    for rank in range(3):
        tables = route_tables(routes, tails, rank)
        lines = [RowLine(i, 4, -1, i if row in tables.kv_receive else -1) for i, row in enumerate(tables.attention)]
        messages.append(StepMessage(routes, tails, lines))
    step = prepare_step(messages, group)
    for _ in range(3):
        group.randomise()
        group.lse.normal_()
        group.load(step)
        group.exchange([0, 1])
        torch.cuda.synchronize()
        assert [set(silent) for silent in group.silent()[:2]] == [{2}, {2}]
        first = [silent[2] for silent in group.silent()[:2]]
        assert first == [1, 1]
        for home in (0, 1):
            oracle = route_tables(routes, tails, home)
            for m, sends in enumerate(oracle.send):
                alive = [(s, slot) for s, slot in sends if s != 2]
                if not alive:
                    assert bool((group.merged[home, m] == 0).all()) and bool((group.merged_lse[home, m] == float("-inf")).all())
                    continue
                lse = torch.stack([group.lse[s, slot] for s, slot in alive])
                values = torch.stack([(group.query[home, m, :, :128] + group.shift[s, 0]).float() for s, _ in alive])
                expected = (torch.softmax(lse, 0).unsqueeze(-1) * values).sum(0)
                torch.testing.assert_close(group.merged[home, m].float(), expected, atol=3e-2, rtol=1e-2)
    for exchange in group.exchanges:
        begin = exchange.layout["return_slots"]
        slots = exchange._bytes[begin : begin + 12 * 16 * 128 * 2]
        assert bool((slots == 0xFF).all()) or exchange.rank == 2
        slots.zero_()  # what a silent peer may send after all
        exchange.forgive()
        assert bool((slots == 0xFF).all())
    assert group.silent()[:2] == [{}, {}]
    group.close()


def test_values_that_look_like_an_empty_slot_arrive_as_nan(library) -> None:
    """A word of ones means "nothing has come": a partial made of them must neither hang nor leave its row without NaN."""
    group = DeviceGroup(SMALL, ExchangeShape(64, 128, 128, 1024, 24))
    step = prepare_step(messages_for(group, 3, "mixed"), group)
    group.randomise()
    group.lse.normal_()
    group.load(step)
    for tables in group.tables:
        tables.build()
    for rank in range(group.num_instances):
        group.dispatch(rank, phases=PHASE_SEND)
    for rank in range(group.num_instances):
        group.dispatch(rank, phases=PHASE_RECEIVE)
        group.partial[rank].view(torch.int16).fill_(-1)
    for phase in (PHASE_SEND, PHASE_RECEIVE):
        for rank in range(group.num_instances):
            group.return_merge(rank, phases=phase)
    torch.cuda.synchronize()
    served = (step.merge_index >= 0).any(-1)
    assert bool(served.any()) and bool(group.merged[served].isnan().all())
    assert group.silent() == [{}] * group.num_instances
    group.close()


def test_wrong_tensors_are_refused_by_name(library) -> None:
    group = DeviceGroup(SMALL, ExchangeShape(64, 128, 128, 1024, 24))
    exchange = group.exchanges[0]
    like = {"dtype": torch.bfloat16, "device": "cuda:0"}
    with pytest.raises(ValueError, match="bytes of one query row.* is 12288, must be 16384"):
        exchange.dispatch(torch.zeros(2, 64, 96, **like))
    with pytest.raises(ValueError, match="query is 7, must be 0 to 6"):
        exchange.dispatch(torch.zeros(7, 64, 128, **like))
    with pytest.raises(ValueError, match="query must be bfloat16"):
        exchange.dispatch(torch.zeros(2, 64, 128, device="cuda:0"))
    with pytest.raises(ValueError, match="key comes with key_pool"):
        exchange.dispatch(torch.zeros(2, 64, 128, **like), key=torch.zeros(2, 1, 512, **like))
    with pytest.raises(ValueError, match="attention rows\\) is 17, must be 0 to 16"):
        exchange.return_merge(torch.zeros(17, 64, 128, **like), torch.zeros(17, 64, device="cuda:0"), torch.zeros(2, 64, 128, **like))
    with pytest.raises(ValueError, match="partial_lse"):
        exchange.return_merge(torch.zeros(4, 64, 128, **like), torch.zeros(4, 63, device="cuda:0"), torch.zeros(2, 64, 128, **like))
    group.close()
