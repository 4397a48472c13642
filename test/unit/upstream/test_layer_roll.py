"""A sharded step that ran an attention layer past our path ends with the layer's name."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_dcp.dataflow.step_mode import STOCK, Eager
from sglang_dcp.policy.split_limits import Layout, SplitLimits
from sglang_dcp.upstream.layers import attention_backend, graphs
from sglang_dcp.upstream.layers.layer_roll import LayerMissedError, LayerRoll
from sglang_dcp.upstream.step.attached import attach
from sglang_dcp.upstream.step.driver import StepDriver
from sglang_dcp.upstream.step.handlers import after_forward
from sglang_dcp.upstream.step.runtime import Runtime

LIMITS = SplitLimits(8, 2, 8, Layout(2, 2))

NAMES = {0: "model.layers.0.self_attn", 1: "model.layers.1.self_attn", 2: "model.layers.2.self_attn"}
EAGER, GRAPH = SimpleNamespace(can_run_cuda_graph=False), SimpleNamespace(can_run_cuda_graph=True)


@pytest.fixture
def bound(monkeypatch: pytest.MonkeyPatch) -> Iterator[Runtime]:
    """A runtime in a sharded eager step, whose attention gives the queries back."""
    found = Runtime(None, None, SimpleNamespace(rank=1, step=7, ids=None, group=range(2), limits=LIMITS), None, None, None)  # type: ignore[arg-type]
    StepDriver(found)
    found.layer_roll, found.mode = LayerRoll(NAMES), Eager(None, [])  # type: ignore[arg-type]
    monkeypatch.setattr(attention_backend, "plan_of_step", lambda *args: None)
    monkeypatch.setattr(attention_backend, "attention_step", lambda queries, *args, **kwargs: queries)
    attach(found)
    yield found
    attach(None)


class Stock:
    token_to_kv_pool = SimpleNamespace(dtype=torch.float32)

    def forward(self, q: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return q


def run_layers(layer_ids: list[int]) -> None:
    """A model's forward pass, as far as attention goes."""
    backend = attention_backend.make_backend_class(Stock)()
    for layer_id in layer_ids:
        heads = {"tp_q_head_num": 2, "tp_k_head_num": 2, "qk_head_dim": 4, "v_head_dim": 4}
        layer = SimpleNamespace(layer_id=layer_id, **heads, scaling=1.0, sliding_window_size=-1)
        rows = torch.zeros(3, 8)
        assert backend.forward(rows, rows, rows, layer, None).shape == (3, 8)


def test_steps_that_run_all_layers_pass(bound: Runtime) -> None:
    for _ in range(2):
        run_layers([0, 1, 2])
        after_forward(EAGER, None)
    assert bound.counters.eager_steps == 2


def test_a_layer_that_bypasses_ends_the_server(bound: Runtime) -> None:
    """One good step first: what entered in it does not count for the next."""
    run_layers([0, 1, 2])
    after_forward(EAGER, None)
    run_layers([0, 2])
    with pytest.raises(LayerMissedError, match=r"^rank 1, step 7: 1 of 3 attention layers .*: model\.layers\.1\.self_attn$"):
        after_forward(EAGER, None)


def test_a_step_that_ran_no_layer_names_them_all(bound: Runtime) -> None:
    with pytest.raises(LayerMissedError, match="3 of 3 attention layers .*layers.0.*layers.1.*layers.2"):
        after_forward(EAGER, None)


def test_a_layer_that_was_not_there_at_load(bound: Runtime) -> None:
    run_layers([0, 1, 2, 9])
    with pytest.raises(LayerMissedError, match=r"rank 1, step 7: layers with ids \[9\]"):
        after_forward(EAGER, None)


def test_steps_without_sharded_rows_count_no_layers(bound: Runtime) -> None:
    bound.mode = STOCK
    run_layers([0])
    after_forward(EAGER, None)
    after_forward(GRAPH, None)
    assert (bound.counters.eager_steps, bound.counters.graph_steps) == (1, 1)


@pytest.mark.parametrize(("with_keys", "save_kv_cache"), [(False, True), (True, False)])
def test_a_layer_that_keeps_its_keys_to_itself_is_refused(bound: Runtime, with_keys: bool, save_kv_cache: bool) -> None:
    rows = torch.zeros(3, 8)
    with pytest.raises(attention_backend.LayerCallError, match="attention layer 5 .*the backend writes them"):
        attention_backend.make_backend_class(Stock)().forward(
            rows, rows if with_keys else None, rows, SimpleNamespace(layer_id=5), None, save_kv_cache
        )


def captured(engine: graphs.GraphEngine, layer_ids: list[int]) -> None:
    """What a capture of one graph does: the shared part first, then each layer."""
    engine.begin_captured(SimpleNamespace(batch_size=1, out_cache_loc=torch.zeros(1, dtype=torch.int64)), 4, torch.zeros(1, 1), 64)
    for layer_id in layer_ids:
        heads = {"tp_q_head_num": 2, "tp_k_head_num": 1, "qk_head_dim": 4, "v_head_dim": 4}
        layer = SimpleNamespace(layer_id=layer_id, **heads, sliding_window_size=None)
        pool = SimpleNamespace(
            dtype=torch.float32,
            set_kv_buffer=lambda *args: None,
            get_key_buffer=lambda layer_id: None,
            get_value_buffer=lambda layer_id: None,
        )
        attention_backend.forward_captured(engine, 4, pool, torch.zeros(1, 8), torch.zeros(1, 4), torch.zeros(1, 4), layer)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> graphs.GraphEngine:
    made = graphs.GraphEngine((4,), [], 0, Layout(1, 1), None)
    made.attention = SimpleNamespace(
        begin=lambda *args: None, run=lambda tokens, *args, **given: torch.zeros(tokens, 2, 4), shape=SimpleNamespace(latent=False)
    )
    made.layer_roll, made._own_slots = LayerRoll(NAMES), torch.zeros(4, dtype=torch.int64)
    monkeypatch.setattr(attention_backend.PoolLayer, "_write_location", staticmethod(lambda slots: slots))
    return made


@pytest.mark.parametrize("last", [False, True])
def test_a_layer_missing_from_a_captured_graph(engine: graphs.GraphEngine, last: bool) -> None:
    """Found when the next graph begins, and behind the last one."""
    captured(engine, [0, 1, 2])
    captured(engine, [0, 1])
    with pytest.raises(LayerMissedError, match=r"rank 0, decode graph with sharded rows: 1 of 3 .*layers\.2\.self_attn"):
        if last:
            engine.end_captured()
        else:
            captured(engine, [0, 1, 2])


def test_captured_graphs_with_all_layers(engine: graphs.GraphEngine) -> None:
    engine.end_captured()
    for _ in range(2):
        captured(engine, [0, 1, 2])
    engine.end_captured()
    engine.end_captured()
