"""Partial attention: FlashInfer without LSE against the adapter with it (GQA), FlashMLA against FlashInfer (MLA, 128 heads)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from timing import Row, graph_microseconds

from sglang_dcp.dataflow.partial_attention_flashinfer import FlashInferDecode, FlashInferMLA, FlashMLADecode

NODES = 8
GQA_CASES = ((64, 4096), (8, 65536), (1, 524288))
MLA_CASES = ((64, 4096), (8, 65536), (1, 524288))
GQA_HEADS, GQA_KV_HEADS, HEAD_DIM, GQA_PAGE = 64, 4, 128, 16
MLA_HEADS, LATENT, ROPE, MLA_PAGE = 128, 512, 64, 64


@dataclass(frozen=True)
class Pages:
    """Page lists of equal rows over scattered pages."""

    indptr: torch.Tensor
    indices: torch.Tensor
    last: torch.Tensor
    lengths: torch.Tensor
    block_table: torch.Tensor

    @staticmethod
    def scattered(rows: int, tokens: int, page_size: int) -> Pages:
        per_row = tokens // page_size
        order = torch.randperm(rows * per_row, generator=torch.Generator().manual_seed(0)).to(torch.int32)
        return Pages(
            torch.arange(0, rows * per_row + 1, per_row, dtype=torch.int32),
            order.cuda(),
            torch.full((rows,), page_size, dtype=torch.int32),
            torch.full((rows,), tokens, dtype=torch.int32),
            order.view(rows, per_row).cuda(),
        )


def random_cache(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, dtype=torch.bfloat16, device="cuda").normal_()


def measure_gqa(rows: int, tokens: int) -> tuple[list[Row], float]:
    pages = Pages.scattered(rows, tokens, GQA_PAGE)
    decode = FlashInferDecode(
        GQA_HEADS, GQA_KV_HEADS, HEAD_DIM, GQA_PAGE, HEAD_DIM**-0.5, pages.indptr.cuda(), pages.indices, pages.last.cuda()
    )
    decode.plan(pages.indptr, pages.last)
    keys, values = (random_cache(rows * tokens // GQA_PAGE, GQA_PAGE, GQA_KV_HEADS, HEAD_DIM) for _ in range(2))
    queries = random_cache(rows, GQA_HEADS, HEAD_DIM)
    output = torch.empty_like(queries)
    stock = graph_microseconds([lambda: decode._wrapper.run(queries, (keys, values), out=output)], nodes=NODES)
    ours = graph_microseconds([lambda: decode.run(queries, keys, values)], nodes=NODES)
    moved = keys.numel() * 4
    name = f"GQA 64/4 x 128, {rows} x {tokens}"
    return [
        Row(f"{name}, FlashInfer without LSE", stock, moved),
        Row(f"{name}, ours with LSE", ours, moved, f"ratio {stock / ours:.3f}"),
    ], stock / ours


def measure_mla(rows: int, tokens: int) -> tuple[list[Row], float, float]:
    pages = Pages.scattered(rows, tokens, MLA_PAGE)
    scale = (128 + ROPE) ** -0.5
    flashinfer = FlashInferMLA(MLA_HEADS, MLA_PAGE, scale, pages.indptr.cuda(), pages.indices, pages.lengths.cuda())
    flashinfer.plan(pages.indptr, pages.lengths)
    flash_mla = FlashMLADecode(MLA_HEADS, scale, pages.block_table, pages.lengths.cuda())
    flash_mla.plan()
    cache = random_cache(rows * tokens // MLA_PAGE, MLA_PAGE, LATENT + ROPE)
    queries = random_cache(rows, MLA_HEADS, LATENT + ROPE)
    times = [
        graph_microseconds([lambda adapter=adapter: adapter.run(queries, cache)], nodes=NODES)  # type: ignore[misc]
        for adapter in (flashinfer, flash_mla)
    ]
    total = rows * tokens
    moved = cache.numel() * 2
    name = f"MLA 128 heads, {rows} x {tokens}"
    return (
        [
            Row(f"{name}, {library}", time, moved, f"{time * 1000 / total:.3f} ns/token")
            for library, time in zip(("FlashInfer", "FlashMLA"), times, strict=True)
        ],
        times[1] * 1000 / total,
        times[0] / times[1],
    )


def measure() -> tuple[list[Row], dict[str, float]]:
    """The keys hold the worst of the cases."""
    rows: list[Row] = []
    ratios, per_token, speedups = [], [], []
    for case in GQA_CASES:
        measured, ratio = measure_gqa(*case)
        rows += measured
        ratios.append(ratio)
    for case in MLA_CASES:
        measured, nanoseconds, speedup = measure_mla(*case)
        rows += measured
        per_token.append(nanoseconds)
        speedups.append(speedup)
    return rows, {"partial_gqa_ratio": min(ratios), "mla_decode_ns_per_token": max(per_token), "mla_decode_speedup": min(speedups)}
