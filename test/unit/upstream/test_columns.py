"""Our control columns behind SGLang's row of a step."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_dcp.ledger.columns import NUM_COLUMNS
from sglang_dcp.ledger.counters import LedgerCounters
from sglang_dcp.policy.split_limits import Layout, SplitLimits
from sglang_dcp.upstream.step import attached
from sglang_dcp.upstream.step.columns import SyncRow
from sglang_dcp.upstream.step.driver import StepDriver
from sglang_dcp.upstream.step.handlers import fallback_columns
from sglang_dcp.upstream.step.runtime import Runtime

OWN = [3, 2, 2**31 - 2, 17, 5, 900_000, 128, 6, 2**40]
LIMITS = SplitLimits(8, 2, 8, Layout(2, 2))


def test_rows_of_two_steps() -> None:
    """Values are those of the step; a row of another width than the first step's is an error."""
    row = SyncRow()
    for _ in range(2):
        stock = torch.randint(0, 1000, (11,))
        assert row.widen(stock, OWN).tolist() == [*stock.tolist(), *OWN]
        assert stock.numel() == 11, "SGLang's own row stays as it is"
    with pytest.raises(RuntimeError, match="11"):
        row.widen(torch.arange(12), OWN)


def test_other_element_types_keep_their_type() -> None:
    stock, own = torch.arange(11, dtype=torch.int32), [*OWN[:8], 4]
    wide = SyncRow().widen(stock, own)
    assert wide.dtype == torch.int32 and wide.tolist() == [*range(11), *own]


def test_the_row_of_a_rank_that_is_gone_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang makes it of constants in every step; it ends in zeros of ours."""
    participant: Any = SimpleNamespace(ids=None, group=range(2), limits=LIMITS)
    monkeypatch.setattr(attached, "_runtime", Runtime(None, None, participant, None, None, None))  # type: ignore[arg-type]
    first, second = (fallback_columns(torch.arange(11), None, "cpu") for _ in range(2))
    assert first.tolist() == [*range(11), *[0] * NUM_COLUMNS] and second is first


def test_waits_for_pages_are_forgotten_where_there_are_no_metrics() -> None:
    counters = LedgerCounters()
    participant: Any = SimpleNamespace(
        ids=None,
        group=range(1),
        limits=LIMITS,
        counters=counters,
        num_sharded_rows=0,
        read_columns=lambda columns: 0,
        finish_step=lambda words, anybody_runs: counters.admission_waits.append(0.5),
    )
    told = torch.zeros(1, NUM_COLUMNS, dtype=torch.int64)
    info = SimpleNamespace(tp0_info_cpu=told, global_num_tokens=[1], can_run_decode_cuda_graph=False)
    for _ in range(100):
        StepDriver(Runtime(None, None, participant, None, None, None)).settle(info)  # type: ignore[arg-type]
    assert counters.admission_waits == []
