"""FlashMLA's adapter, and captured steps over it, with the library and the exchange replaced by plain torch."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest
import torch

from sglang_dcp.dataflow.attention.flashmla import FlashMLADecode
from sglang_dcp.dataflow.attention.paged_attention import AttentionShape
from sglang_dcp.dataflow.graph.table_rows import ListedRow
from sglang_dcp.dataflow.reference import partial_attention
from test.unit.dataflow import fake_flash_mla
from test.unit.dataflow.fake_flash_mla import FakeFlashMla

HEADS, PAGE_SIZE, WIDTH, SCALE = 16, 64, 4, 0.07


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> FakeFlashMla:
    return fake_flash_mla.install(monkeypatch)


def test_schedules_once_per_step(library: FakeFlashMla) -> None:
    lengths, table = torch.zeros(3, dtype=torch.int32), torch.zeros(3, WIDTH, dtype=torch.int32)
    decode, cache = FlashMLADecode(HEADS, SCALE, table, lengths), torch.randn(9, PAGE_SIZE, 576).bfloat16()
    queries = torch.randn(3, HEADS, 576).bfloat16()
    for step, tokens in enumerate([(1, 130, 0), (2, 131, 0), (0, 0, 64)]):
        lengths.copy_(torch.tensor(tokens))
        table.copy_(torch.randperm(8)[:WIDTH] + 1)
        decode.plan()
        for _ in range(2):
            state = decode.run(queries, cache)
        assert (library.num_schedules, library.num_runs) == (step + 2, 2 * step + 2)
        for row, length in enumerate(tokens):
            keys = cache[table[row].long()].flatten(0, 1)[:length].unsqueeze(1)
            expected = partial_attention(queries[row : row + 1], keys, keys[..., :512], scale=SCALE)
            assert torch.equal(state.output[row], expected.output[0]) and torch.equal(state.lse[row], expected.lse[0])
    lengths += 1
    with pytest.raises(AssertionError, match="a schedule of another step"):
        decode.run(queries, cache)


def test_empty_shards_stay_marked_by_infinity_on_request(library: FakeFlashMla) -> None:
    decode = FlashMLADecode(HEADS, SCALE, torch.zeros(1, WIDTH, dtype=torch.int32), torch.zeros(1, dtype=torch.int32))
    decode.plan()
    queries, cache = torch.randn(1, HEADS, 576).bfloat16(), torch.randn(1, PAGE_SIZE, 576).bfloat16()
    assert bool((decode.run(queries, cache).lse == float("-inf")).all())
    assert bool((decode.run(queries, cache, mark_neutral=False).lse == float("inf")).all())


def test_quantised_latents_have_a_key_in_every_row_and_empty_shards_stay_neutral(library: FakeFlashMla) -> None:
    dtype = torch.float8_e4m3fn
    lengths, table = torch.zeros(3, dtype=torch.int32), torch.zeros(3, WIDTH, dtype=torch.int32)
    decode = FlashMLADecode(HEADS, SCALE, table, lengths, kv_dtype=dtype)
    cache, queries = (torch.randn(*shape).to(dtype) for shape in ((9, PAGE_SIZE, 576), (3, HEADS, 576)))
    for tokens in ((1, 130, 0), (0, 0, 0), (0, 64, 2)):
        lengths.copy_(torch.tensor(tokens))
        decode.plan()
        state = decode.run(queries, cache)
        assert state.output.dtype == torch.bfloat16
        for row, length in enumerate(tokens):
            keys = cache.view(torch.uint8)[table[row].long()].flatten(0, 1)[:length].view(dtype).float().bfloat16().unsqueeze(1)
            expected = partial_attention(queries[row : row + 1].float().bfloat16(), keys, keys[..., :512], scale=SCALE)
            assert torch.equal(state.lse[row], expected.lse[0])
            assert not length or torch.equal(state.output[row], expected.output[0])


@pytest.mark.parametrize("heads", [8, 144])
def test_heads_that_were_not_run_are_refused(library: FakeFlashMla, heads: int) -> None:
    with pytest.raises(ValueError, match=f"flashmla serves 16 to 128 heads per instance, this model has {heads}"):
        FlashMLADecode(heads, SCALE, torch.zeros(1, WIDTH, dtype=torch.int32), torch.zeros(1, dtype=torch.int32))


class FakeTables:
    """StepTables of one instance: what the table kernel makes of the rows, without routes."""

    def __init__(self, shape: Any, rank: int, num_entries: int, device: torch.device, max_return_rows: int) -> None:
        self.buffer = torch.zeros(1, dtype=torch.int32)
        self.resident_pages = torch.zeros(num_entries, shape.max_pages_per_row, dtype=torch.int32)
        rows = shape.max_attention_rows
        self._sections = {
            "kv_length": torch.zeros(rows, dtype=torch.int32),
            "block_table": torch.zeros(rows, shape.max_pages_per_row, dtype=torch.int32),
        }

    def upload(self, message: Any) -> None:
        self.upload_rows(message.rows)

    def upload_rows(self, rows: np.ndarray, *, check: bool = True) -> None:
        self._rows = rows.copy()

    def upload_rows_at(self, address: int) -> None:
        words = (ctypes.c_int32 * self._rows.size).from_address(address)
        self._rows = np.array(words, dtype=np.int32).reshape(-1, 4)

    def build(self, token_table: torch.Tensor | None = None, pool_pages: int = 1) -> None:
        self._sections["kv_length"].zero_()
        for row, (entry, tokens, new_page, _) in enumerate(self._rows.tolist()):
            pages = -(-tokens // PAGE_SIZE)
            if new_page >= 0:
                self.resident_pages[entry, pages - 1] = new_page
            self._sections["kv_length"][row] = tokens
            self._sections["block_table"][row, :pages] = self.resident_pages[entry, :pages]

    def section(self, name: str) -> torch.Tensor:
        return self._sections[name]


class FakeExchange:
    """PeerExchange of an instance without peers: attention rows are its own rows."""

    def __init__(self, rank: int, shape: Any, tables: FakeTables, *, early_launch: bool = True, **given: Any) -> None:
        self.early_launch, self.tables = early_launch, tables
        self.layout, self.state = {"silent_mask": 0}, torch.zeros(4, dtype=torch.uint8)
        self.query_rows = torch.zeros(len(tables.section("kv_length")), shape.num_heads, shape.qk_head_dim, dtype=torch.bfloat16)

    def dispatch(self, query: torch.Tensor, **given: Any) -> torch.Tensor:
        self.query_rows[: len(query)] = query
        return self.query_rows

    def return_merge(self, output: torch.Tensor, lse: torch.Tensor, merged: torch.Tensor, merged_lse: torch.Tensor | None) -> None:
        seen = lse[: len(merged)].isfinite().unsqueeze(-1)
        if merged_lse is not None:
            merged_lse.copy_(lse[: len(merged)])
        merged.copy_(torch.where(seen, output[: len(merged)], torch.zeros_like(merged)))


@pytest.fixture
def attention(library: FakeFlashMla, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Graph attention of one instance on the CPU, 3 home rows and 2 guest rows."""
    pytest.importorskip("sgl_kernel_dcp")
    from sglang_dcp.dataflow.graph import graph_attention

    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, pin_memory=False, **given: zeros(*size, **given))
    monkeypatch.setattr(graph_attention, "StepTables", FakeTables)
    monkeypatch.setattr(graph_attention, "PeerExchange", FakeExchange)
    return build(HEADS, PAGE_SIZE)


def build(heads: int, page_size: int) -> Any:
    from sglang_dcp.dataflow.graph.graph_attention import GraphAttention, GraphSizes

    shape = AttentionShape(heads, 1, 576, 512, torch.bfloat16, SCALE, latent=True)
    sizes = GraphSizes(num_instances=2, max_home_rows=3, guest_rows=(2,), page_size=page_size, context_pages=WIDTH, pool_pages=9)
    return GraphAttention(0, sizes, shape, torch.device("cpu"), num_sharing=1, wait_seconds=1.0, kernel="flashmla")


def test_captured_steps_read_the_tables_alone(attention: Any, library: FakeFlashMla) -> None:
    """`begin` and `run` are what a graph replays: a step's `fill` or `advance`, and `plan`, must do the rest without the kernel."""
    assert attention.exchange.early_launch is False, "FlashMLA's kernel does not wait for its predecessor"
    attention.prepare(3, 2)
    pool = torch.randn(9 * PAGE_SIZE, 1, 576).bfloat16()
    held = [[(0, 3), (1, 5)], [(0, 1)]]
    lengths, words = [64, 2], [np.array([1, 1], dtype=np.int32), np.zeros(0, dtype=np.int32)]
    no_tokens = torch.zeros(1, 1, dtype=torch.int32)
    for step in range(3):
        if step == 0:
            rows = [ListedRow(row, lengths[row], held[row], grows=True, arrives=False) for row in range(2)]
            attention.fill(step, words, rows, no_tokens)
        else:
            attention.advance(step, no_tokens)
        schedules = library.num_schedules
        attention.plan(3, 2)
        assert library.num_schedules == schedules
        attention.begin(3, 2, no_tokens)
        queries = torch.randn(3, HEADS, 576).bfloat16()
        for _ in range(2):
            merged = attention.run(3, 2, (queries, None), queries[:, :1, :512], queries[:, :1, 512:], (pool, pool))
        assert library.num_schedules == schedules + 1
        for row, pages in enumerate(held):
            keys = pool.unflatten(0, (-1, PAGE_SIZE))[[number for _, number in pages]].flatten(0, 1)[: lengths[row] + step]
            expected = partial_attention(queries[row : row + 1], keys, keys[..., :512], scale=SCALE)
            assert torch.equal(merged[row], expected.output[0])
        assert not merged[2].any(), "a row of padding attends nothing"


def test_other_page_sizes_are_refused_at_start(attention: Any) -> None:
    with pytest.raises(ValueError, match="needs pages of 64 tokens, got 16"):
        build(HEADS, 16)
    with pytest.raises(ValueError, match="16 to 128 heads"):
        build(8, PAGE_SIZE)
