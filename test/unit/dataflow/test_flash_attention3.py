"""FlashAttention 3 in graphs with sharded rows, by a stand-in that computes with plain torch: calls are checked against the installed
library's signature, which is read from its source."""

from __future__ import annotations

import ast
import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from sglang_dcp.dataflow.attention.flash_attention3 import FlashAttention3Decode
from sglang_dcp.dataflow.attention.flash_splits import has_causal_schedule, most_splits
from sglang_dcp.dataflow.attention.paged_attention import AttentionShape
from sglang_dcp.dataflow.contracts import KVScales
from sglang_dcp.dataflow.graph.table_rows import ListedRow
from sglang_dcp.dataflow.reference import partial_attention
from test.unit.dataflow.test_flash_mla import FakeExchange, FakeTables

HEADS, KV_HEADS, DIM, PAGE, WIDTH, SCALE = 8, 2, 128, 64, 4, 0.09
FP8, SCALES = torch.float8_e4m3fn, KVScales(0.5, 2.0)


class FakeFlashAttention:
    """The one function; `calls` has what it was given."""

    def __init__(self) -> None:
        spec = importlib.util.find_spec("sgl_kernel")
        if spec is None or spec.origin is None:
            pytest.skip("sglang-kernel is not installed")
        tree = ast.parse((Path(spec.origin).parent / "flash_attn.py").read_text())
        (found,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "flash_attn_with_kvcache"]
        self.parameters = [argument.arg for argument in found.args.args]
        self.calls: list[dict[str, Any]] = []

    def __call__(self, *call: Any, **given: Any) -> tuple[torch.Tensor, ...]:
        assert set(given) <= set(self.parameters[len(call) :]), "a parameter that it does not have"
        arguments = dict(zip(self.parameters, call, strict=False)) | given
        self.calls.append(arguments)
        queries, keys, values = arguments["q"], arguments["k_cache"], arguments["v_cache"]
        rows, num_tokens, heads, dim = queries.shape
        page = keys.shape[1]
        assert num_tokens == 1 and keys.shape == values.shape == (len(keys), page, KV_HEADS, dim) and queries.dtype == keys.dtype
        output, lse = torch.zeros(rows, 1, heads, dim, dtype=torch.bfloat16), torch.full((rows, heads, 1), float("-inf"))
        scales = [arguments[name] for name in ("k_descale", "v_descale")]
        for row, length in enumerate(arguments["cache_seqlens"].tolist()):
            pages = arguments["page_table"][row, : -(-length // page)].long()
            seen = [cache.float()[pages].flatten(0, 1)[:length] for cache in (keys, values)]
            seen = [part if scale is None else part * scale[row, :, None] for part, scale in zip(seen, scales, strict=True)]
            state = partial_attention(queries[row].float(), *seen, scale=arguments["softmax_scale"])
            output[row], lse[row, :, 0] = state.output, state.lse[0]
        return output, lse, None


class FakeSchedule:
    """In place of a FlashSchedule, whose device code runs on a GPU: `planned` has the lengths of every plan."""

    def __init__(self, *sizes: Any, **more: Any) -> None:
        self.sizes, self.more = sizes, more
        self.metadata = torch.zeros(1, dtype=torch.int32)
        self.planned: list[list[int]] = []

    def plan(self, lengths: torch.Tensor) -> None:
        self.planned.append(lengths.tolist())


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> FakeFlashAttention:
    pytest.importorskip("triton")
    monkeypatch.setattr("sglang_dcp.dataflow.attention.flash_schedule.FlashSchedule", FakeSchedule)
    fake = FakeFlashAttention()
    module = ModuleType("sgl_kernel.flash_attn")
    module.__dict__["flash_attn_with_kvcache"] = fake
    monkeypatch.setitem(sys.modules, "sgl_kernel", ModuleType("sgl_kernel"))
    monkeypatch.setitem(sys.modules, "sgl_kernel.flash_attn", module)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=132))
    return fake


@pytest.mark.parametrize(("dtype", "scales"), [(torch.bfloat16, KVScales()), (FP8, SCALES)])
def test_rows_over_scattered_pages(library: FakeFlashAttention, dtype: torch.dtype, scales: KVScales) -> None:
    lengths, table = torch.tensor([130, 0, 64], dtype=torch.int32), torch.randperm(12).view(3, WIDTH).to(torch.int32)
    decode = FlashAttention3Decode(KV_HEADS, SCALE, table, lengths)
    keys, values = (torch.randn(12, PAGE, KV_HEADS, DIM).to(dtype) for _ in range(2))
    queries = torch.randn(3, HEADS, DIM).to(dtype)
    state = decode.run(queries, keys, values, scales)
    for row, length in enumerate(lengths.tolist()):
        seen = [cache.float()[table[row].long()].flatten(0, 1)[:length] for cache in (keys, values)]
        expected = partial_attention(queries[row : row + 1].float(), seen[0] * scales.key, seen[1] * scales.value, scale=SCALE)
        torch.testing.assert_close(state.output[row].float(), expected.output[0], atol=1e-2, rtol=1e-2)
        torch.testing.assert_close(state.lse[row], expected.lse[0])
    assert bool((state.lse[1] == float("-inf")).all()) and library.calls[0]["num_splits"] == 66


def test_rows_are_scheduled_once_per_step_for_all_layers(library: FakeFlashAttention) -> None:
    lengths, table = torch.tensor([64, 1], dtype=torch.int32), torch.zeros(2, WIDTH, dtype=torch.int32)
    decode: Any = FlashAttention3Decode(KV_HEADS, SCALE, table, lengths, kv_dtype=FP8)
    schedule = decode._schedule
    assert schedule.sizes == (2, KV_HEADS, 66, torch.device("cpu"))
    assert schedule.more == {"multiprocessors": 132, "causal": False, "block_tokens": 160}
    pool = torch.randn(1, PAGE, KV_HEADS, DIM).to(FP8)
    for step in ([64, 1], [65, 2]):
        lengths.copy_(torch.tensor(step))
        decode.plan()
        for _ in range(2):
            decode.run(torch.randn(2, HEADS, DIM).to(FP8), pool, pool)
    assert schedule.planned == [[64, 1], [65, 2]] and all(call["scheduler_metadata"] is schedule.metadata for call in library.calls)


def test_what_a_schedule_does_not_fit_is_left_to_the_library(library: FakeFlashAttention) -> None:
    many: Any = FlashAttention3Decode(KV_HEADS, SCALE, torch.zeros(993, 1, dtype=torch.int32), torch.zeros(993, dtype=torch.int32))
    many.plan()
    assert many._schedule is None
    lengths, table = torch.ones(1, dtype=torch.int32), torch.zeros(1, WIDTH, dtype=torch.int32)
    wide: Any = FlashAttention3Decode(KV_HEADS, SCALE, table, lengths)
    assert wide._schedule_for(64 * KV_HEADS) is not None and wide._schedule_for(64 * KV_HEADS + KV_HEADS) is None


@pytest.mark.parametrize(("head_dim", "is_causal"), [(64, False), (96, True), (128, True), (192, False), (256, False)])
def test_heads_for_which_a_causal_call_is_scheduled_as_such(head_dim: int, is_causal: bool) -> None:
    assert has_causal_schedule(head_dim) == is_causal


def test_a_row_alone_reaches_every_multiprocessor() -> None:
    assert [most_splits(132, kv_heads) for kv_heads in (1, 2, 4, 8, 132)] == [128, 66, 33, 17, 2]


def test_stock_s_split_is_its_own_number(library: FakeFlashAttention) -> None:
    lengths, table = torch.ones(1, dtype=torch.int32), torch.zeros(1, WIDTH, dtype=torch.int32)
    pool = torch.randn(1, PAGE, KV_HEADS, DIM).bfloat16()
    decode = FlashAttention3Decode(KV_HEADS, SCALE, table, lengths, own_split=False)
    decode.plan()
    decode.run(torch.randn(1, HEADS, DIM).bfloat16(), pool, pool)
    assert library.calls[0]["num_splits"] == 0 and library.calls[0]["scheduler_metadata"] is None


def make_attention(monkeypatch: pytest.MonkeyPatch, shape: AttentionShape, windows: tuple[int, ...] = ()) -> Any:
    """Graph attention of one instance on the CPU, 3 home rows and 2 guest rows."""
    pytest.importorskip("sgl_kernel_dcp")
    from sglang_dcp.dataflow.graph import graph_attention
    from sglang_dcp.dataflow.graph.graph_attention import GraphAttention, GraphSizes

    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, pin_memory=False, **given: zeros(*size, **given))
    monkeypatch.setattr(graph_attention, "StepTables", FakeTables)
    monkeypatch.setattr(graph_attention, "PeerExchange", FakeExchange)
    sizes = GraphSizes(num_instances=2, max_home_rows=3, guest_rows=(2,), page_size=PAGE, context_pages=WIDTH, pool_pages=9)
    given = {"num_sharing": 1, "wait_seconds": 1.0, "kernel": "fa3", "windows": windows}
    attention: Any = GraphAttention(0, sizes, shape, torch.device("cpu"), **given)
    attention.prepare(3, 2)
    return attention


@pytest.mark.parametrize("quantised", [None, FP8])
def test_captured_steps_read_the_tables_alone(
    library: FakeFlashAttention, monkeypatch: pytest.MonkeyPatch, quantised: torch.dtype | None
) -> None:
    """`begin` and `run` are what a graph replays; nothing is planned on the host."""
    shape = AttentionShape(HEADS, KV_HEADS, DIM, DIM, torch.bfloat16, SCALE, latent=False, quantised=quantised)
    attention = make_attention(monkeypatch, shape)
    assert attention.exchange.early_launch is False and attention.plans_on_device
    pools = [torch.randn(9 * PAGE, KV_HEADS, DIM).to(shape.kv_dtype) for _ in range(2)]
    held, lengths = [[(0, 3), (1, 5)], [(0, 1)]], [64, 2]
    rows = [ListedRow(row, lengths[row], held[row], grows=True, arrives=False) for row in range(2)]
    words, no_tokens = [np.array([1, 1], dtype=np.int32), np.zeros(0, dtype=np.int32)], torch.zeros(1, 1, dtype=torch.int32)
    for step in range(2):
        attention.fill(step, words, rows, no_tokens) if step == 0 else attention.advance(step, no_tokens)
        attention.plan(3, 2)
        attention.begin(3, 2, no_tokens)
        queries, new = torch.randn(3, HEADS, DIM).bfloat16(), torch.randn(3, 1, KV_HEADS * DIM).to(shape.kv_dtype)
        merged = attention.run(3, 2, (queries, None), new, new, pools)
        for row, pages in enumerate(held):
            seen = [pool.float().unflatten(0, (-1, PAGE))[[number for _, number in pages]].flatten(0, 1) for pool in pools]
            asked = queries[row : row + 1].to(shape.kv_dtype).float()
            expected = partial_attention(asked, *(part[: lengths[row] + step] for part in seen), scale=SCALE)
            torch.testing.assert_close(merged[row].float(), expected.output[0], atol=2e-2, rtol=2e-2)
        assert not merged[2].any(), "a row of padding attends nothing"
    schedule = attention._kernels[3, 2]._schedule
    assert schedule.planned[-2:] == [[64, 2, 0, 0, 0], [65, 3, 0, 0, 0]] and schedule.more["block_tokens"] == (160 if quantised else 128)


def test_window_layers_read_the_last_tokens_and_sinks_take_their_share(
    library: FakeFlashAttention, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers of a window, of all keys, and of fewer heads than the widest take turns in one step, over the same pool."""
    shape = AttentionShape(HEADS, KV_HEADS, DIM, DIM, torch.bfloat16, SCALE, latent=False)
    attention = make_attention(monkeypatch, shape, windows=(5, 70))
    pools = [torch.randn(9 * PAGE, KV_HEADS, DIM).bfloat16() for _ in range(2)]
    # The second row's page 1 lies elsewhere: of the last 70 tokens but one it has those of page 0 alone.
    held, lengths = [[(0, 3), (1, 5)], [(0, 1)]], [126, 80]
    rows = [ListedRow(row, lengths[row], held[row], grows=row == 0, arrives=False) for row in range(2)]
    words, no_tokens = [np.array([1, 1], dtype=np.int32), np.zeros(0, dtype=np.int32)], torch.zeros(1, 1, dtype=torch.int32)
    sinks = torch.randn(HEADS).bfloat16()
    for step in range(4):
        if step == 2:
            held[0].append((2, 7))
        attention.fill(step, words, rows, no_tokens) if step == 0 else attention.advance(step, no_tokens)
        attention.begin(3, 2, no_tokens)
        for window, heads, has_sinks in ((None, HEADS, True), (5, HEADS, True), (70, 4, False), (None, 4, False)):
            queries, new = torch.randn(3, heads, DIM).bfloat16(), torch.randn(3, 1, KV_HEADS * DIM).bfloat16()
            given = {"window": window, "sinks": sinks if has_sinks else None}
            merged = attention.run(3, 2, (queries, None), new, new, pools, **given)
            assert merged.shape == (3, heads, DIM)
            for row, pages in enumerate(held):
                last = lengths[row] + step - 1
                slots = [(index * PAGE + i, number * PAGE + i) for index, number in pages for i in range(PAGE)]
                first = 0 if window is None else last - window
                seen = torch.tensor([slot for position, slot in slots if first <= position <= last], dtype=torch.int64)
                expected = partial_attention(queries[row : row + 1], *(pool[seen] for pool in pools), scale=SCALE)
                output = expected.output[0].float()
                if has_sinks:
                    output *= torch.sigmoid(expected.lse[0] - sinks.float()).unsqueeze(-1)
                torch.testing.assert_close(merged[row].float(), output, atol=2e-2, rtol=2e-2)
            assert not merged[2].any()


def test_kernels_without_window_layers_are_named() -> None:
    pytest.importorskip("sgl_kernel_dcp")
    from sglang_dcp.dataflow.graph.graph_sizes import check_kernel

    shape = AttentionShape(HEADS, KV_HEADS, DIM, DIM, torch.bfloat16, SCALE, latent=False)
    check_kernel("fa3", shape, PAGE, (127,))
    with pytest.raises(ValueError, match="--attention-backend flashinfer serves no window layers.*use fa3"):
        check_kernel("flashinfer", shape, PAGE, (127,))


def test_latent_attention_has_another_kernel() -> None:
    pytest.importorskip("sgl_kernel_dcp")
    from sglang_dcp.dataflow.graph.graph_sizes import check_kernel

    latent = AttentionShape(16, 1, 576, 512, torch.bfloat16, SCALE, latent=True)
    with pytest.raises(ValueError, match="--attention-backend fa3 serves no latent attention"):
        check_kernel("fa3", latent, PAGE)
    quantised = AttentionShape(16, 1, 576, 512, torch.bfloat16, SCALE, latent=True, quantised=FP8)
    with pytest.raises(ValueError, match="need --attention-backend flashmla"):
        check_kernel("flashinfer", quantised, PAGE)
