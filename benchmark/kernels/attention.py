"""Partial attention: FlashInfer without LSE against the adapter with it (GQA), FlashMLA against FlashInfer (MLA, 128 heads)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmark.kernels.timing import Row
from sglang_dcp.dataflow.attention.flashinfer_graph import FlashInferDecode, FlashInferMLA
from sglang_dcp.dataflow.attention.flashmla import FlashMLADecode
from sglang_dcp.dataflow.measure.timing import graph_microseconds

NODES = 8
GQA_CASES = ((64, 4096), (8, 65536), (1, 524288))
MLA_CASES = ((64, 4096), (16, 16384), (8, 65536), (4, 131072), (1, 524288))
GQA_HEADS, GQA_KV_HEADS, HEAD_DIM, GQA_PAGE = 64, 4, 128, 16
MLA_HEADS, LATENT, ROPE, MLA_PAGE = 128, 512, 64, 64
MLA_PARTS = 8  # of a single row
MLA_KEY = (8, 65536)  # long rows, some of them: what sharding leaves on an instance


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


def measure_mla(rows: int, tokens: int) -> tuple[list[Row], list[float]]:
    """Rows of the table, and nanoseconds per token of FlashInfer and FlashMLA (a single row: of FlashMLA in parts, too)."""
    pages = Pages.scattered(rows, tokens, MLA_PAGE)
    scale = (128 + ROPE) ** -0.5
    flashinfer = FlashInferMLA(MLA_HEADS, MLA_PAGE, scale, pages.indptr.cuda(), pages.indices, pages.lengths.cuda())
    flashinfer.plan(pages.indptr, pages.lengths)
    flash_mla = FlashMLADecode(MLA_HEADS, scale, pages.block_table, pages.lengths.cuda())
    flash_mla.plan()
    cache = random_cache(rows * tokens // MLA_PAGE, MLA_PAGE, LATENT + ROPE)
    queries = random_cache(rows, MLA_HEADS, LATENT + ROPE)
    times = [
        graph_microseconds([lambda: flashinfer.run(queries, cache)], nodes=NODES),
        graph_microseconds([lambda: flash_mla.run(queries, cache, mark_neutral=False)], nodes=NODES),
    ]
    libraries = ["FlashInfer", "FlashMLA"]
    if rows == 1:
        in_parts = FlashMLADecode(MLA_HEADS, scale, pages.block_table, pages.lengths.cuda(), num_parts=MLA_PARTS)
        in_parts.plan()
        times.append(graph_microseconds([lambda: in_parts.run(queries, cache)], nodes=NODES))
        libraries.append(f"FlashMLA in {MLA_PARTS} parts")
    per_token = [time * 1000 / (rows * tokens) for time in times]
    moved = cache.numel() * 2
    name = f"MLA 128 heads, {rows} x {tokens}"
    table = [
        Row(f"{name}, {library}", time, moved, f"{nanoseconds:.3f} ns/token")
        for library, time, nanoseconds in zip(libraries, times, per_token, strict=True)
    ]
    return table, per_token


def measure() -> tuple[list[Row], dict[str, float | dict[str, float]]]:
    """The GQA key holds the worst of the cases, the MLA keys the case MLA_KEY; `mla_decode_by_shape` holds all cases, in ns per token."""
    rows: list[Row] = []
    ratios = []
    for case in GQA_CASES:
        measured, ratio = measure_gqa(*case)
        rows += measured
        ratios.append(ratio)
    by_shape: dict[str, float] = {}
    key = speedup = 0.0
    for case in MLA_CASES:
        measured, per_token = measure_mla(*case)
        rows += measured
        best = min(per_token[1:])
        by_shape[f"{case[0]} x {case[1]}"] = round(best, 4)
        by_shape[f"{case[0]} x {case[1]}, FlashInfer"] = round(per_token[0], 4)
        if case == MLA_KEY:
            key, speedup = best, per_token[0] / best
    return rows, {
        "partial_gqa_ratio": min(ratios),
        "mla_decode_ns_per_token": key,
        "mla_decode_speedup": speedup,
        "mla_decode_by_shape": by_shape,
    }
