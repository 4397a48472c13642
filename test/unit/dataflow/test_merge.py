"""The merge of a step's partial results: in plain torch, and as the kernel that runs on a GPU (here in Triton's interpreter)."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import sys

import numpy as np
import pytest
import torch

from sglang_dcp.dataflow.attention.partial_attention import torch_partial_attention
from sglang_dcp.dataflow.contracts import MergeList, PartialState, TokenList
from sglang_dcp.dataflow.dispatch import partial_width, partials_in
from sglang_dcp.dataflow.merge import merge_into, merge_partial_states
from sglang_dcp.dataflow.step_plan import merge_list
from test.unit.dataflow.cluster import Cluster


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


def as_returned(state: PartialState) -> PartialState:
    """The same rows where a message has them."""
    rows, heads, dim = state.output.shape
    there = partials_in(torch.zeros(rows, partial_width(heads, dim, state.output.dtype), dtype=state.output.dtype), heads, dim)
    there.output.copy_(state.output)
    there.lse.copy_(state.lse)
    return there


NUM_TOKENS = 8
SOURCES = {
    "a run, one shard": (np.zeros(0, dtype=np.int64), [np.arange(2, 6)]),
    "scattered, at home and elsewhere": (np.array([7, 0, 3]), [np.array([3, 1]), np.zeros(0, dtype=np.int64), np.array([0, 1, 5])]),
    "all tokens of 15 shards": (np.arange(NUM_TOKENS), [np.arange(NUM_TOKENS)] * 15),
    "at home alone": (np.array([5]), []),
}
"""Tokens attended at home, and by each shard."""
SHAPES = [(4, 16), (3, 24), (1, 8), (20, 512)]


def check(merge, sources: tuple[np.ndarray, list[np.ndarray]], heads: int, dim: int, dtype: torch.dtype, rounding: float = 2**-8) -> None:
    """rounding: relative error of one result in bfloat16."""
    pool_tokens, asked = sources
    before, own = states(NUM_TOKENS, heads, dim, dtype, 1), states(len(pool_tokens), heads, dim, dtype, 2)
    returned = states(sum(map(len, asked)), heads, dim, dtype, 3)
    state = PartialState(before.output.clone(), before.lse.clone())
    merges = merge_list(NUM_TOKENS, pool_tokens, asked)
    merge(state, merges, own, as_returned(returned))
    places = list(enumerate(itertools.chain(*asked)))
    for token in range(NUM_TOKENS):
        parts = [PartialState(before.output[token], before.lse[token])]
        parts += [PartialState(own.output[row], own.lse[row]) for row in np.flatnonzero(pool_tokens == token)]
        parts += [PartialState(returned.output[row], returned.lse[row]) for row, of in places if of == token]
        if len(parts) == 1:
            bits = torch.int32 if dtype == torch.float32 else torch.int16
            assert state.output[token].view(bits).equal(before.output[token].view(bits)) and state.lse[token].equal(before.lse[token])
            continue
        expected = merge_partial_states(torch.stack([p.output for p in parts]).double(), torch.stack([p.lse for p in parts]))
        relative = 2e-6 if dtype == torch.float32 else rounding
        torch.testing.assert_close(state.output[token].double(), expected.output, atol=1e-6, rtol=relative)
        torch.testing.assert_close(state.lse[token], expected.lse, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("sources", SOURCES.values(), ids=SOURCES)
@pytest.mark.parametrize(("heads", "dim"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_in_torch(sources, heads, dim, dtype):
    check(merge_into, sources, heads, dim, dtype)


@pytest.mark.parametrize("sources", SOURCES.values(), ids=SOURCES)
@pytest.mark.parametrize(("heads", "dim"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_as_a_kernel(merge_kernel, sources, heads, dim, dtype):
    check(merge_kernel, sources, heads, dim, dtype, rounding=2**-7)  # the interpreter cuts off where a GPU rounds


class Bfloat16Cluster(Cluster):
    """Instances that compute in bfloat16, and a record of the partials that their kernels rounded."""

    def __init__(self, num_instances: int) -> None:
        super().__init__(3, num_instances, 4, latent=False)
        for pool in self.pools:
            pool.keys, pool.values = pool.keys.bfloat16(), pool.values.bfloat16()
        self.partials: list[PartialState] = []

    def randn(self, *shape: int) -> torch.Tensor:
        return super().randn(*shape).bfloat16()

    def attend(self, *args: object, **kwargs: object) -> PartialState:
        exact = torch_partial_attention(*args, **kwargs)
        state = PartialState(exact.output.bfloat16(), exact.lse)
        self.partials.append(state)
        return state


@pytest.mark.parametrize("num_shards", range(2, 17))
def test_the_answer_is_rounded_once_however_many_shards_answer(num_shards: int) -> None:
    cluster = Bfloat16Cluster(num_shards)
    cluster.add(home=0, prefix_len=num_shards * 4 - 1, num_new=1, owners=list(range(num_shards)))
    merged = cluster.run([cluster.attend] * num_shards)[0]
    assert merged.dtype == torch.bfloat16 and len(cluster.partials) == num_shards
    lses = torch.stack([part.lse for part in cluster.partials]).double()
    exact = (torch.stack([part.output for part in cluster.partials]).double() * lses.softmax(dim=0).unsqueeze(-1)).sum(dim=0)
    # Half a unit in the last of bfloat16's eight places, and what float32 adds to it.
    errors = (merged.double() - exact).abs() / (exact.abs() * 2**-8 + 1e-6)
    assert errors.max() <= 1.001, f"{num_shards} shards: {errors.max():.2f} x the error of one rounding"


def test_what_a_message_brings_is_read_where_it_lies():
    """In bfloat16 and float32: an LSE keeps its 32 bits."""
    for dtype in (torch.bfloat16, torch.float32):
        state = states(5, 3, 8, dtype, 4)
        there = as_returned(state)
        assert there.lse.equal(state.lse) and there.output.dtype == dtype
        assert there.output.untyped_storage().data_ptr() == there.lse.untyped_storage().data_ptr()


def test_merge_list_names_every_partial_once():
    merges = merge_list(6, np.array([4, 1]), [np.zeros(0, dtype=np.int64), np.array([4, 0]), np.array([5, 4])])
    assert merges.tokens.tolist() == [0, 1, 4, 5] and merges.pool_rows.tolist() == [-1, 1, 0, -1]
    assert merges.begins.tolist() == [0, 1, 1, 3, 4] and merges.returned_rows.tolist() == [1, 0, 3, 2]
    assert len(merge_list(6, np.zeros(0, dtype=np.int64), [])) == 0


def test_the_kernel_refuses_strided_rows(merge_kernel):
    state, part = states(8, 4, 16, torch.float32, 1), states(8, 4, 32, torch.float32, 2)
    merges = merge_list(8, np.arange(8), [np.arange(8)])
    cut = PartialState(part.output[..., :16], part.lse)
    with pytest.raises(ValueError, match="contiguous own"):
        merge_kernel(state, merges, cut, as_returned(state))
    with pytest.raises(ValueError, match="returned rows"):
        merge_kernel(state, merges, state, cut)


def test_a_run_of_tokens_is_a_view():
    rows = torch.arange(20.0).view(10, 2)
    run, gathered = TokenList.of(np.arange(3, 7)), TokenList.of(np.array([3, 5]))
    assert run.take(rows).data_ptr() == rows[3].data_ptr() and run.take(rows).equal(rows[3:7])
    assert gathered.first is None and gathered.take(rows).equal(rows[[3, 5]])
    assert TokenList.of(np.zeros(0, dtype=np.int64)).first is None and TokenList.of(np.array([4])).first == 4


def test_the_kernel_is_prepared_for_a_shape(merge_kernel):
    sys.modules["sglang_dcp.dataflow.merge_kernel"].prepare(8, 128, torch.device("cpu"))


def test_index_lists_are_the_fields_in_order():
    """They travel to the device in one copy and are taken apart there."""
    merges = merge_list(3, np.array([1]), [np.array([1, 2])])
    assert [part.tolist() for part in MergeList(*merges.index_lists).index_lists] == [part.tolist() for part in merges.index_lists]
    assert len(merges.index_lists) == len(dataclasses.fields(MergeList))


@pytest.mark.parametrize("own", ["bf16", "fp32"])
def test_the_kernel_compiles_for_hopper(own: str) -> None:
    """Without a GPU. own: what an attention kernel returns, FlashInfer's or plain torch."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = importlib.import_module("sglang_dcp.dataflow.merge_kernel")._merge_rows
    indices = dict.fromkeys(("tokens", "pool_rows", "begins", "returned_rows"), "*i64")
    lses = dict.fromkeys(("lses", "own_lses", "returned_lses"), "*fp32")
    sizes = {"heads": 128, "dim": 512, "returned_stride": 128 * 514, "returned_lse_stride": 64 * 514, "block_heads": 8, "block_dim": 512}
    outputs = {"outputs": "*bf16", "own_outputs": f"*{own}", "returned_outputs": "*bf16"}
    source = ASTSource(
        fn=kernel,
        signature=indices | lses | outputs | dict.fromkeys(sizes, "constexpr"),
        constexprs={(kernel.arg_names.index(name),): value for name, value in sizes.items()},
    )
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    except FileNotFoundError as error:
        pytest.skip(f"no ptxas on this machine: {error}")
    assert "sm_90" in compiled.asm["ptx"]
