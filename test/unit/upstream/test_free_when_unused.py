"""A step without sharded rows costs eight columns on SGLang's own all-gather: no second exchange, no code of ours in a layer."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sglang_dcp.config import DynCpConfig
from sglang_dcp.dataflow.step_mode import STOCK
from sglang_dcp.ledger import columns as col
from sglang_dcp.ledger.messages import Row, RowColumns
from sglang_dcp.ledger.participant import Participant
from sglang_dcp.upstream.layers.attention_backend import make_backend_class
from sglang_dcp.upstream.step import attached, handlers
from sglang_dcp.upstream.step import sync as step_sync
from sglang_dcp.upstream.step.driver import StepDriver
from sglang_dcp.upstream.step.runtime import Runtime, cluster_of

RANKS = 2


class Pool:
    """A pool nobody takes pages from."""

    def num_givable_pages(self):
        return 8

    def take_pages(self, count):
        raise AssertionError("no page is asked for")

    def return_pages(self, pages):
        assert not pages


@pytest.fixture
def runtime(monkeypatch):
    scheduler = SimpleNamespace(running_batch=SimpleNamespace(reqs=[]), waiting_queue=[], chunked_req=None)
    config, pool = DynCpConfig().resolve(RANKS), Pool()
    participant = Participant(cluster_of(config, RANKS, 8, 4), 0, pool)
    made = Runtime(scheduler, config, participant, pool, transport=None, control_group=None)
    StepDriver(made)
    monkeypatch.setattr(attached, "_runtime", made)
    return made


@pytest.fixture
def exchanges(monkeypatch):
    """Counts exchanges beside SGLang's own."""
    seen = []
    monkeypatch.setattr(step_sync.dist, "all_gather", lambda outputs, own, group: seen.append(own) or [o.copy_(own) for o in outputs])
    return seen


def step(runtime, rows=()):
    """One step in which both ranks report the same; returns SGLang's sync record after our hook."""
    stock = torch.zeros(11, dtype=torch.int64)
    local = handlers.local_columns(stock, None, "cpu")
    assert local.numel() == stock.numel() + col.NUM_COLUMNS
    info = SimpleNamespace(
        tp0_info_cpu=torch.stack([local] * RANKS), global_num_tokens=[3, 0], num_tokens=3, can_run_decode_cuda_graph=True
    )
    handlers.after_gather(None, info)
    return info


def test_no_second_exchange_and_no_floor_without_sharded_rows(runtime, exchanges):
    for _ in range(5):
        info = step(runtime)
        assert info.global_num_tokens == [3, 0]
    assert exchanges == []
    assert runtime.mode is STOCK


def test_a_steady_sharded_row_needs_no_second_exchange_either(runtime, exchanges, monkeypatch):
    """Rows travel when they change; while a request just decodes on, every instance advances its table alone."""
    monkeypatch.setattr(step_sync, "home_rows", lambda runtime: [])
    monkeypatch.setattr(runtime.own_batch, "take", lambda batch: None)
    batch, row = runtime.own_batch, lambda: RowColumns.of([Row(1, 40 + runtime.participant.step, 1)])
    monkeypatch.setattr(batch, "news", lambda: None if batch.steady else row())
    for number in range(6):
        batch.steady = number > 3
        info = step(runtime)
        assert info.global_num_tokens == [3, 1], "an instance without tokens takes part when a row is sharded"
    assert len(exchanges) == 1


def test_the_stock_backend_runs_untouched(runtime):
    class Stock:
        def forward(self, *arguments, **keywords):
            return arguments, keywords

    backend = make_backend_class(Stock)()
    assert backend.forward("q", "k", "v", "layer", "batch", False, extra=1) == (("q", "k", "v", "layer", "batch", False), {"extra": 1})


def test_columns_of_a_missing_rank_are_neutral(runtime):
    row = handlers.fallback_columns(torch.zeros(11, dtype=torch.int64), None, "cpu")
    assert row.numel() == 11 + col.NUM_COLUMNS
    assert np.count_nonzero(row.numpy()) == 0
