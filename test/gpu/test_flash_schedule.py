"""Our schedules for FlashAttention 3 on a GPU: they are what plain Python computes, and attention by them is attention over all keys."""

from __future__ import annotations

import pytest
import torch

from sglang_dcp.dataflow.reference import partial_attention
from testing.captures import capturing
from testing.kernels.flash_schedule import Sizes, parts_of_rows, read_schedule

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
    pytest.skip("no Hopper GPU on this machine", allow_module_level=True)
pytest.importorskip("sgl_kernel")

PAGE, ROWS, FP8 = 64, 96, torch.float8_e4m3fn
STEPS = (
    [1] * ROWS,
    [40] * 95 + [30_000],
    [0] * 60 + [700, 64, 65, 20_011] + [129] * 32,
    [0] * ROWS,
    [3_500] * 22 + [0] * 74,
    [9000, 0, 12_345, *[1] * 93],
)
"""Tokens of every row, step by step, of one captured graph."""
HEADS = [(32, 4, 128), (16, 2, 128), (64, 8, 128), (8, 8, 128), (64, 8, 64)]


def sizes_of(kv_heads: int, dtype: torch.dtype) -> Sizes:
    from sglang_dcp.dataflow.attention.flash_schedule import block_tokens
    from sglang_dcp.dataflow.attention.flash_splits import most_splits

    multiprocessors = torch.cuda.get_device_properties("cuda").multi_processor_count
    return Sizes(kv_heads, multiprocessors, most_splits(multiprocessors, kv_heads), block_tokens(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, FP8])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), HEADS)
def test_replays_of_a_graph_that_schedules_its_rows(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    from sglang_dcp.dataflow.attention.flash_attention3 import FlashAttention3Decode

    pages = sum(-(-tokens // PAGE) for tokens in max(STEPS, key=sum)) + 1
    like = {"dtype": torch.bfloat16, "device": "cuda"}
    keys, values = (torch.randn(pages, PAGE, kv_heads, head_dim, **like).to(dtype) for _ in range(2))
    queries = torch.randn(ROWS, heads, head_dim, **like).to(dtype)
    lengths = torch.zeros(ROWS, dtype=torch.int32, device="cuda")
    table = torch.zeros(ROWS, 500, dtype=torch.int32, device="cuda")
    decode = FlashAttention3Decode(kv_heads, head_dim**-0.5, table, lengths, kv_dtype=dtype)
    decode.plan()
    decode.run(queries, keys, values)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with capturing(graph):
        decode.plan()
        layers = [decode.run(queries, keys, values) for _ in range(3)]
    assert decode._schedule is not None
    for seed, tokens in enumerate([*STEPS, *reversed(STEPS)]):
        lengths.copy_(torch.tensor(tokens, dtype=torch.int32))
        order = torch.randperm(pages, generator=torch.Generator().manual_seed(seed)).to(torch.int32)
        begin = 0
        for row, count in enumerate(tokens):
            listed = order[begin : begin + -(-count // PAGE)]
            table[row, : len(listed)].copy_(listed)
            begin += len(listed)
        graph.replay()
        torch.cuda.synchronize()
        sizes = sizes_of(kv_heads, dtype)
        parts, _ = read_schedule(decode._schedule.metadata.tolist(), ROWS, kv_heads, causal=False)
        assert parts == [count for count, _ in parts_of_rows(tokens, sizes)]
        for later in layers[1:]:
            assert torch.equal(later.output, layers[0].output) and torch.equal(later.lse, layers[0].lse)
        for row, count in enumerate(tokens):
            if not count:
                assert bool((layers[0].lse[row].abs() == float("inf")).all())
                continue
            listed = table[row, : -(-count // PAGE)].long()
            seen = [cache[listed].flatten(0, 1)[:count] for cache in (keys, values)]
            expected = partial_attention(queries[row : row + 1].float(), *seen, scale=head_dim**-0.5)
            rough = 0.1 if dtype == FP8 else 2e-2  # weights of the keys have three bits behind the point
            torch.testing.assert_close(layers[0].output[row].float(), expected.output[0], rtol=rough, atol=rough)
            torch.testing.assert_close(layers[0].lse[row], expected.lse[0], rtol=1e-3, atol=5e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, FP8])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), HEADS)
def test_sglang_s_own_call_takes_them(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    """As its backend decodes: one token per sequence, causal."""
    from sgl_kernel.flash_attn import flash_attn_with_kvcache

    from sglang_dcp.dataflow.attention.flash_schedule import check_layout
    from sglang_dcp.dataflow.attention.flash_splits import has_causal_schedule, splits_of
    from sglang_dcp.upstream.layers.flash_schedules import FlashSchedules

    check_layout(heads, kv_heads, head_dim, dtype, PAGE, has_causal_schedule(head_dim), "cuda")
    schedules = FlashSchedules(kv_heads, head_dim, dtype, "cuda")
    tokens = [20_000] * 7 + [1, 129, 4_000]
    lengths = torch.tensor(tokens, dtype=torch.int32, device="cuda")
    counts = (lengths + PAGE - 1) // PAGE
    table = torch.zeros(len(tokens), int(counts.max()), dtype=torch.int32, device="cuda")
    order = torch.randperm(int(counts.sum())).to(torch.int32).cuda()
    for row, part in enumerate(order.split(counts.tolist())):
        table[row, : len(part)] = part
    like = {"dtype": torch.bfloat16, "device": "cuda"}
    keys, values = (torch.randn(len(order), PAGE, kv_heads, head_dim, **like).to(dtype) for _ in range(2))
    given = {
        "q": torch.randn(len(tokens), heads, head_dim, **like).to(dtype),
        "k_cache": keys,
        "v_cache": values,
        "page_table": table,
        "cache_seqlens": lengths,
        "cu_seqlens_q": torch.arange(len(tokens) + 1, dtype=torch.int32, device="cuda"),
        "max_seqlen_q": 1,
        "softmax_scale": head_dim**-0.5,
        "causal": True,
        "num_splits": splits_of("cuda", kv_heads, own_split=True),
    }
    wanted = flash_attn_with_kvcache(**given)
    metadata = schedules(len(tokens), max(tokens), lengths, None)
    assert metadata is not None
    for _ in range(3):
        made = flash_attn_with_kvcache(**given, scheduler_metadata=metadata)
        torch.testing.assert_close(made, wanted, rtol=5e-2 if dtype == FP8 else 2e-2, atol=2e-2 if dtype == FP8 else 5e-3)
    parts, _ = read_schedule(metadata.tolist(), len(tokens), kv_heads, causal=has_causal_schedule(head_dim))
    assert parts == [count for count, _ in parts_of_rows(tokens, sizes_of(kv_heads, dtype))]
