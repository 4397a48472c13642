"""A captured decode with our split budget: replanned for other lengths it gives what attention over the whole rows gives."""

from __future__ import annotations

import pytest
import torch

from sglang_dcp.dataflow.reference import partial_attention
from testing.captures import capturing

pytestmark = pytest.mark.gpu
pytest.importorskip("flashinfer")
if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
    pytest.skip("no Hopper GPU on this machine", allow_module_level=True)

PAGE, HEAD_DIM, ROWS = 64, 128, 96
STEPS = (
    [1] * ROWS,
    [40] * 95 + [30_000],
    [0] * 60 + [700, 64, 65, 20_011] + [129] * 32,
    [0] * ROWS,
    [9000, 0, 12_345, *[1] * 93],
)
"""Tokens of every row, step by step, of one captured graph."""


@pytest.mark.parametrize(("heads", "kv_heads"), [(32, 4), (16, 2), (64, 8), (64, 4), (8, 8)])
def test_replays_after_a_new_plan(heads: int, kv_heads: int) -> None:
    from sglang_dcp.dataflow.attention.flashinfer_graph import FlashInferDecode

    pages = sum(-(-tokens // PAGE) for tokens in max(STEPS, key=sum))
    like = {"dtype": torch.bfloat16, "device": "cuda"}
    keys, values = (torch.randn(pages + 1, PAGE, kv_heads, HEAD_DIM, **like) for _ in range(2))
    queries = torch.randn(ROWS, heads, HEAD_DIM, **like)
    indptr = torch.zeros(ROWS + 1, dtype=torch.int32, device="cuda")
    indices = torch.zeros(pages + ROWS, dtype=torch.int32, device="cuda")
    last = torch.zeros(ROWS, dtype=torch.int32, device="cuda")
    lengths = torch.zeros(ROWS, dtype=torch.int32, device="cuda")
    decode = FlashInferDecode(heads, kv_heads, HEAD_DIM, PAGE, HEAD_DIM**-0.5, indptr, indices, last)

    def plan(tokens: list[int], seed: int) -> None:
        counts = [-(-count // PAGE) for count in tokens]
        begin = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32)
        used = [count - (number - 1) * PAGE if count else 0 for count, number in zip(tokens, counts, strict=True)]
        ends = torch.tensor(used, dtype=torch.int32)
        order = torch.randperm(pages, generator=torch.Generator().manual_seed(seed))[: int(begin[-1])].to(torch.int32)
        indices[: len(order)].copy_(order)
        indptr.copy_(begin)
        last.copy_(ends)
        lengths.copy_(torch.tensor(tokens, dtype=torch.int32))
        decode.mark_empty_rows(lengths)
        decode.plan(begin, ends)

    plan(STEPS[0], 0)
    decode.run(queries, keys, values)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with capturing(graph):
        state = decode.run(queries, keys, values)
    for seed, tokens in enumerate([*STEPS, *reversed(STEPS)]):
        plan(tokens, seed)
        decode._output.fill_(7.0)
        graph.replay()
        torch.cuda.synchronize()
        begin = indptr.tolist()
        for row, count in enumerate(tokens):
            if not count:
                assert bool((state.lse[row] == float("-inf")).all())
                continue
            listed = indices[begin[row] : begin[row + 1]].long()
            seen = [cache[listed].flatten(0, 1)[:count] for cache in (keys, values)]
            expected = partial_attention(queries[row : row + 1].float(), *seen, scale=HEAD_DIM**-0.5)
            torch.testing.assert_close(state.output[row].float(), expected.output[0], rtol=2e-2, atol=2e-2)
            torch.testing.assert_close(state.lse[row], expected.lse[0], rtol=1e-3, atol=1e-3)
