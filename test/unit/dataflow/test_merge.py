"""The merge of one partial result into others, in plain torch and as the kernel that runs on a GPU (here in Triton's interpreter)."""

from __future__ import annotations

import importlib
import sys

import numpy as np
import pytest
import torch

from sglang_dcp.dataflow.contracts import PartialState, TokenList
from sglang_dcp.dataflow.merge import merge_into, merge_partial_states


@pytest.fixture
def merge_kernel(monkeypatch):
    """merge_rows, interpreted: Triton reads the variable when a kernel is decorated."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    name = "sglang_dcp.dataflow.merge_kernel"
    sys.modules.pop(name, None)
    yield importlib.import_module(name).merge_rows
    sys.modules.pop(name, None)


def states(rows: int, heads: int, dim: int, dtype: torch.dtype, seed: int) -> PartialState:
    rng = torch.Generator().manual_seed(seed)
    lse = 3 * torch.randn(rows, heads, generator=rng)
    # Some partials are neutral, and hold rubbish then.
    neutral = torch.rand(rows, heads, generator=rng) < 0.3
    output = torch.randn(rows, heads, dim, generator=rng).masked_fill(neutral.unsqueeze(-1), float("nan"))
    return PartialState(output.to(dtype), lse.masked_fill(neutral, float("-inf")))


TOKENS = [np.arange(2, 6), np.array([7, 0, 3]), np.arange(8), np.array([5])]
SHAPES = [(4, 16), (3, 24), (1, 8), (20, 512)]


def check(merge, tokens: np.ndarray, heads: int, dim: int, dtype: torch.dtype) -> None:
    before, part = states(8, heads, dim, dtype, 1), states(len(tokens), heads, dim, dtype, 2)
    state = PartialState(before.output.clone(), before.lse.clone())
    merge(state, TokenList.of(tokens), part)
    expected = merge_partial_states(torch.stack([before.output[tokens], part.output]).float(), torch.stack([before.lse[tokens], part.lse]))
    torch.testing.assert_close(state.output[tokens].float(), expected.output, atol=1e-6 if dtype == torch.float32 else 2e-2, rtol=1e-2)
    torch.testing.assert_close(state.lse[tokens], expected.lse, atol=1e-5, rtol=1e-5)
    others = np.setdiff1d(np.arange(8), tokens)
    assert state.output[others].equal(before.output[others]) or state.output[others].isnan().equal(before.output[others].isnan())
    assert state.lse[others].equal(before.lse[others])


@pytest.mark.parametrize("tokens", TOKENS, ids=str)
@pytest.mark.parametrize(("heads", "dim"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_in_torch(tokens, heads, dim, dtype):
    check(merge_into, tokens, heads, dim, dtype)


@pytest.mark.parametrize("tokens", TOKENS, ids=str)
@pytest.mark.parametrize(("heads", "dim"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_as_a_kernel(merge_kernel, tokens, heads, dim, dtype):
    check(merge_kernel, tokens, heads, dim, dtype)


def test_the_kernel_refuses_strided_rows(merge_kernel):
    state, part = states(8, 4, 16, torch.float32, 1), states(8, 4, 32, torch.float32, 2)
    with pytest.raises(ValueError, match="contiguous"):
        merge_kernel(state, TokenList.of(np.arange(8)), PartialState(part.output[..., :16], part.lse))


def test_a_run_of_tokens_is_a_view():
    rows = torch.arange(20.0).view(10, 2)
    run, gathered = TokenList.of(np.arange(3, 7)), TokenList.of(np.array([3, 5]))
    assert run.take(rows).data_ptr() == rows[3].data_ptr() and run.take(rows).equal(rows[3:7])
    assert gathered.first is None and gathered.take(rows).equal(rows[[3, 5]])
    assert TokenList.of(np.zeros(0, dtype=np.int64)).first is None and TokenList.of(np.array([4])).first == 4


def test_the_kernel_is_prepared_for_a_shape(merge_kernel):
    sys.modules["sglang_dcp.dataflow.merge_kernel"].prepare(8, 128, torch.device("cpu"))
