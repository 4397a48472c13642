"""FlashInfer and FlashMLA adapters against the oracle: natural-log LSE, neutral empty shards, static buffers, graph capture."""

from __future__ import annotations

import pytest
import torch

from sglang_dcp.dataflow.contracts import PartialState
from sglang_dcp.dataflow.reference import partial_attention
from testing.captures import capturing

pytestmark = pytest.mark.gpu
pytest.importorskip("flashinfer")
if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
    pytest.skip("no Hopper GPU on this machine", allow_module_level=True)

LENGTHS = [[1, 5, 64, 0, 1000, 333, 128, 0], [0, 0, 0, 0, 0, 0, 0, 0], [4096, 1, 0, 63, 65, 64, 1, 2], [0, 0, 0, 0, 0, 0, 0, 7]]


def page_lists(lengths: list[int], page_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """indptr, indices, last page length, block table; pages scattered."""
    counts = [-(-tokens // page_size) for tokens in lengths]
    indptr = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32)
    indices = torch.randperm(sum(counts) + 3)[: sum(counts)].to(torch.int32)
    last = torch.tensor([0 if t == 0 else (t - 1) % page_size + 1 for t in lengths], dtype=torch.int32)
    block_table = torch.zeros(len(lengths), 4096 // page_size, dtype=torch.int32)
    for row, count in enumerate(counts):
        block_table[row, :count] = indices[indptr[row] : indptr[row] + count]
    return indptr, indices, last, block_table


def gather(cache: torch.Tensor, pages: torch.Tensor, tokens: int) -> torch.Tensor:
    return cache[pages.long()].flatten(0, 1)[:tokens]


def check(state: PartialState, expected: list[PartialState], *, atol: float = 1e-2, rtol: float = 2e-2) -> None:
    lse = torch.cat([partial.lse for partial in expected])
    output = torch.cat([partial.output for partial in expected]).float()
    assert torch.equal(state.lse == float("-inf"), lse == float("-inf"))
    seen = lse != float("-inf")
    torch.testing.assert_close(state.lse[seen], lse[seen], atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(state.output.float()[seen], output[seen], atol=atol, rtol=rtol)


def static(values: torch.Tensor, size: int) -> torch.Tensor:
    buffer = torch.zeros(size, dtype=torch.int32, device="cuda")
    buffer[: len(values)] = values.cuda()
    return buffer


@pytest.mark.parametrize("page_size", [16, 64])
def test_gqa_decode(page_size: int) -> None:
    from sglang_dcp.dataflow.attention.flashinfer_graph import FlashInferDecode

    torch.manual_seed(0)
    indptr, indices, last = static(torch.zeros(9), 9), static(torch.zeros(1), 4096), static(torch.zeros(8), 8)
    decode = FlashInferDecode(64, 4, 128, page_size, 0.09, indptr, indices, last)
    keys, values = (torch.randn(600, page_size, 4, 128, device="cuda").to(torch.bfloat16) for _ in range(2))
    for lengths in LENGTHS:
        host_indptr, host_indices, host_last, _ = page_lists(lengths, page_size)
        indptr.copy_(host_indptr)
        indices[: len(host_indices)] = host_indices.cuda()
        last.copy_(host_last)
        decode.plan(host_indptr, host_last)
        decode.mark_empty_rows(indptr.diff())
        assert decode.serves(host_indptr.diff().numpy())
        queries = torch.randn(8, 64, 128, device="cuda").to(torch.bfloat16)
        state = decode.run(queries, keys, values)
        graph = torch.cuda.CUDAGraph()
        with capturing(graph):
            state = decode.run(queries, keys, values)
        graph.replay()
        expected = []
        for row, tokens in enumerate(lengths):
            pages = host_indices[host_indptr[row] : host_indptr[row + 1]].cuda()
            here, there = gather(keys, pages, tokens), gather(values, pages, tokens)
            expected.append(partial_attention(queries[row : row + 1], here, there, scale=0.09))
        check(state, expected)


@pytest.mark.parametrize("causal", [False, True])
def test_gqa_prefill(causal: bool) -> None:
    from sglang_dcp.dataflow.attention.flashinfer_graph import FlashInferPrefill

    torch.manual_seed(1)
    prefill = FlashInferPrefill(64, 4, 128, 16, 0.09, "cuda")
    keys, values = (torch.randn(600, 16, 4, 128, device="cuda").to(torch.bfloat16) for _ in range(2))
    lengths = [100, 33, 7, 64] if causal else [100, 0, 7, 64]
    tokens = [30, 33, 1, 20]
    host_indptr, host_indices, host_last, _ = page_lists(lengths, 16)
    query_indptr = torch.tensor([0, *torch.tensor(tokens).cumsum(0).tolist()], dtype=torch.int32)
    prefill.plan(query_indptr, host_indptr, host_indices.cuda(), host_last, causal=causal)
    queries = torch.randn(sum(tokens), 64, 128, device="cuda").to(torch.bfloat16)
    state = prefill.run(queries, keys, values)
    expected = []
    for row, length in enumerate(lengths):
        pages = host_indices[host_indptr[row] : host_indptr[row + 1]].cuda()
        positions = torch.arange(length, device="cuda")
        chunk = queries[query_indptr[row] : query_indptr[row + 1]]
        where = {"query_positions": positions[-tokens[row] :], "key_positions": positions} if causal else {}
        expected.append(partial_attention(chunk, gather(keys, pages, length), gather(values, pages, length), scale=0.09, **where))
    check(state, expected)


@pytest.mark.parametrize("library", ["flashinfer", "flash_mla", "flash_mla in 8 parts"])
@pytest.mark.parametrize("heads", [64, 128])
def test_mla_decode(library: str, heads: int) -> None:
    from sglang_dcp.dataflow.attention.flashinfer_graph import FlashInferMLA
    from sglang_dcp.dataflow.attention.flashmla import FlashMLADecode

    pytest.importorskip(library.split()[0])
    if library.endswith("parts"):
        pytest.importorskip("sgl_kernel_dcp")
    torch.manual_seed(2)
    indptr, indices, lengths_buffer = static(torch.zeros(9), 9), static(torch.zeros(1), 4096), static(torch.zeros(8), 8)
    block_table = torch.zeros(8, 64, dtype=torch.int32, device="cuda")
    flashinfer = FlashInferMLA(heads, 64, 0.07, indptr, indices, lengths_buffer) if library == "flashinfer" else None
    num_parts = 8 if library.endswith("parts") else 1
    flash_mla = FlashMLADecode(heads, 0.07, block_table, lengths_buffer, num_parts=num_parts) if library != "flashinfer" else None
    cache = torch.randn(300, 64, 576, device="cuda").to(torch.bfloat16)
    for lengths in LENGTHS:
        host_indptr, host_indices, _, host_table = page_lists(lengths, 64)
        host_lengths = torch.tensor(lengths, dtype=torch.int32)
        indptr.copy_(host_indptr)
        indices[: len(host_indices)] = host_indices.cuda()
        lengths_buffer.copy_(host_lengths)
        block_table.copy_(host_table)
        queries = torch.randn(8, heads, 576, device="cuda").to(torch.bfloat16)
        if flashinfer is not None:
            flashinfer.plan(host_indptr, host_lengths)
            flashinfer.mark_empty_rows(lengths_buffer)
            state = flashinfer.run(queries, cache)
        else:
            assert flash_mla is not None
            flash_mla.plan()
            state = flash_mla.run(queries, cache)
        expected = []
        for row, tokens in enumerate(lengths):
            latent = gather(cache, host_indices[host_indptr[row] : host_indptr[row + 1]].cuda(), tokens).unsqueeze(1)
            expected.append(partial_attention(queries[row : row + 1], latent, latent[..., :512], scale=0.07))
        check(state, expected)


@pytest.mark.parametrize("heads", [16, 128])
def test_flash_mla_schedules_within_a_graph(heads: int) -> None:
    """One capture of plan and run serves steps of any lengths, without work of the host."""
    pytest.importorskip("flash_mla")
    from sglang_dcp.dataflow.attention.flashmla import FlashMLADecode

    torch.manual_seed(3)
    lengths_buffer, block_table = static(torch.zeros(8), 8), torch.zeros(8, 64, dtype=torch.int32, device="cuda")
    decode = FlashMLADecode(heads, 0.07, block_table, lengths_buffer)
    cache = torch.randn(300, 64, 576, device="cuda").to(torch.bfloat16)
    queries = torch.randn(8, heads, 576, device="cuda").to(torch.bfloat16)
    decode.plan()
    decode.run(queries, cache)
    graph = torch.cuda.CUDAGraph()
    with capturing(graph):
        decode.plan()
        decode.run(queries, cache)
        state = decode.run(queries, cache)
    for lengths in LENGTHS:
        host_indptr, host_indices, _, host_table = page_lists(lengths, 64)
        lengths_buffer.copy_(torch.tensor(lengths, dtype=torch.int32))
        block_table.copy_(host_table)
        queries.normal_()
        graph.replay()
        expected = []
        for row, tokens in enumerate(lengths):
            latent = gather(cache, host_indices[host_indptr[row] : host_indptr[row + 1]].cuda(), tokens).unsqueeze(1)
            expected.append(partial_attention(queries[row : row + 1], latent, latent[..., :512], scale=0.07))
        check(state, expected)


@pytest.mark.parametrize("heads", [16, 64, 128])
def test_flash_mla_over_quantised_latents(heads: int) -> None:
    """Queries are quantised too; within the kernel the weights of the keys are, to three bits behind the point."""
    pytest.importorskip("flash_mla")
    from sglang_dcp.dataflow.attention.flashmla import FlashMLADecode

    torch.manual_seed(4)
    dtype = torch.float8_e4m3fn
    lengths_buffer, block_table = static(torch.zeros(8), 8), torch.zeros(8, 64, dtype=torch.int32, device="cuda")
    decode = FlashMLADecode(heads, 0.07, block_table, lengths_buffer, kv_dtype=dtype)
    cache, queries = (torch.randn(*shape, device="cuda").to(dtype) for shape in ((300, 64, 576), (8, heads, 576)))
    decode.plan()
    decode.run(queries, cache)
    graph = torch.cuda.CUDAGraph()
    with capturing(graph):
        decode.plan()
        state = decode.run(queries, cache)
    for lengths in LENGTHS:
        host_indptr, host_indices, _, host_table = page_lists(lengths, 64)
        lengths_buffer.copy_(torch.tensor(lengths, dtype=torch.int32))
        block_table.copy_(host_table)
        queries.copy_(torch.randn(8, heads, 576, device="cuda").to(dtype))
        graph.replay()
        replayed = PartialState(state.output.clone(), state.lse.clone())
        decode.plan()
        eager = decode.run(queries, cache)
        assert torch.equal(replayed.output, eager.output) and torch.equal(replayed.lse, eager.lse)
        expected = []
        for row, tokens in enumerate(lengths):
            pages = host_indices[host_indptr[row] : host_indptr[row + 1]].cuda()
            latent = gather(cache.view(torch.uint8), pages, tokens).view(dtype).float().unsqueeze(1)
            expected.append(partial_attention(queries[row : row + 1].float(), latent, latent[..., :512], scale=0.07))
        check(replayed, expected, atol=8e-2, rtol=8e-2)


@pytest.mark.parametrize("heads", [64, 128])
def test_mla_rows_over_quantised_latents(heads: int) -> None:
    """What an eager step runs: bfloat16 queries, one or several of a row."""
    from sglang_dcp.dataflow.attention.flashinfer_step import flashinfer_kernel
    from sglang_dcp.dataflow.attention.kernel_table import kernel_table
    from sglang_dcp.dataflow.attention.paged_attention import AttentionShape
    from sglang_dcp.dataflow.contracts import NO_SCALES, AttentionRow

    torch.manual_seed(5)
    dtype, device = torch.float8_e4m3fn, torch.device("cuda")
    kernel = flashinfer_kernel(AttentionShape(heads, 1, 576, 512, torch.bfloat16, 0.07, True, quantised=dtype), 64, device)
    cache = torch.randn(300, 64, 1, 576, device=device).to(dtype)
    counts, numbers = {1: 1000, 5: 333, 3: 64}, torch.randperm(300).numpy()
    rows = [AttentionRow(queries, numbers[20 * i : 20 * i + 20], 64, keys) for i, (queries, keys) in enumerate(counts.items())]
    table = kernel_table(rows, 64)
    queries = torch.randn(sum(counts), heads, 576, device=device).bfloat16()
    kernel.plan(table, torch.from_numpy(table.page_indices).to(device), causal=False)
    state = kernel.run(queries, cache, cache[..., :512], None, NO_SCALES)
    expected = []
    for row, asked in zip(rows, queries.split(list(counts)), strict=True):
        latent = cache.view(torch.uint8)[row.page_numbers[: -(-row.num_keys // 64)]].flatten(0, 1)[: row.num_keys].view(dtype).float()
        expected.append(partial_attention(asked.float(), latent, latent[..., :512], scale=0.07))
    check(state, expected)
