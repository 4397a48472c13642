"""Decode attention as a server's graphs run it, timed over rows x longest row: the table that `sglang-dcp calibrate` fits."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from sglang_dcp.dataflow.attention.flash_attention3 import FlashAttention3Decode
from sglang_dcp.dataflow.attention.flashinfer_graph import (
    MLA_LATENT_DIM,
    MLA_ROPE_DIM,
    QUANTISED,
    FlashInferDecode,
    FlashInferMLA,
    KernelBuffers,
)
from sglang_dcp.dataflow.attention.flashmla import FlashMLADecode
from sglang_dcp.dataflow.measure.timing import graph_microseconds

PAGE, NODES, REPEATS = 64, 8, 15
PADDING = 64
"""Rows that a graph with guest rows is captured with beyond those of the step."""


@dataclass(frozen=True)
class DecodeShape:
    """Attention of one instance. latent: MLA in absorbed form, whose widths are the kernels'. kernel: of graphs with sharded rows, by the
    backend's name (fa3 and flashinfer for GQA, flashinfer and flashmla for MLA)."""

    num_heads: int
    kv_heads: int = 1
    head_dim: int = 128
    latent: bool = False
    quantised: bool = False
    kernel: str = "flashinfer"


@dataclass(frozen=True)
class Case:
    """`requests` rows of `tokens_per_request`, one of them of `longest_row` tokens where that is not 0, and rows of padding."""

    requests: int
    tokens_per_request: int
    longest_row: int = 0
    padding: int = PADDING

    def lengths(self) -> list[int]:
        """Tokens per captured row, the long one last of the rows that are no padding."""
        long = [self.longest_row] if self.longest_row else []
        return [*[self.tokens_per_request] * (self.requests - len(long)), *long, *[0] * self.padding]


SHORT = 1_000
CASES = (
    *(Case(rows, SHORT, longest) for rows in (1, 16, 48, 128) for longest in (4_000, 100_000, 300_000)),
    Case(32, SHORT),
    Case(128, SHORT),
    Case(128, SHORT, padding=0),
    Case(16, SHORT, 100_000, padding=0),
    Case(8, 65_536),
    Case(64, 4_096),
)
"""Idle and loaded, one long row or none, graphs with and without room for guests. Together some seconds, once the kernels are built."""


class Pages:
    """Page lists of rows of these tokens over scattered pages; rows of 0 tokens are padding."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self.lengths = torch.tensor(tokens, dtype=torch.int32)
        counts = (self.lengths + PAGE - 1) // PAGE
        self.counts = counts.numpy()
        self.indptr = torch.cat([torch.zeros(1, dtype=torch.int32), counts.cumsum(0, dtype=torch.int32)])
        self.total = int(self.indptr[-1])
        self.indices = torch.randperm(self.total, generator=torch.Generator().manual_seed(0)).to(torch.int32).cuda()
        self.last = torch.where(counts > 0, (self.lengths - 1) % PAGE + 1, 0).to(torch.int32)

    def block_table(self, width: int | None = None) -> torch.Tensor:
        """[rows, pages of the longest row or `width`] on the device."""
        table = torch.zeros(len(self.lengths), width or int(self.counts.max()), dtype=torch.int32, device="cuda")
        for row, (begin, end) in enumerate(zip(self.indptr[:-1].tolist(), self.indptr[1:].tolist(), strict=True)):
            table[row, : end - begin] = self.indices[begin:end]
        return table


def measure(shape: DecodeShape, limit_s: float, cases: Sequence[Case] = CASES) -> Iterator[tuple[Case, float]]:
    """Microseconds of a layer for every case, none begun after `limit_s` seconds.

    Raises RuntimeError without a GPU, and what the libraries raise for a shape that they do not serve.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("attention is measured on a CUDA GPU, and torch sees none here")
    ends = time.monotonic() + limit_s
    most_pages = max(sum(-(-tokens // PAGE) for tokens in case.lengths()) for case in cases)
    most_rows = max(len(case.lengths()) for case in cases)
    build = _latent_runner(shape, most_pages) if shape.latent else _grouped_runner(shape, most_pages, most_rows)
    for case in cases:
        if time.monotonic() >= ends:
            return
        run = build(Pages(case.lengths()))
        yield case, graph_microseconds([run], nodes=NODES, repeats=REPEATS)


Builder = Callable[[Pages], Callable[[], object]]


def _grouped_runner(shape: DecodeShape, most_pages: int, most_rows: int) -> Builder:
    """With our split of long rows, LSE included."""
    dtype = QUANTISED if shape.quantised else torch.bfloat16
    caches = [torch.randn(most_pages, PAGE, shape.kv_heads, shape.head_dim, dtype=torch.bfloat16, device="cuda").to(dtype) for _ in "kv"]
    buffers = KernelBuffers.allocate(most_rows, shape.num_heads, shape.head_dim, "cuda")

    def build(pages: Pages) -> Callable[[], object]:
        heads = (shape.num_heads, shape.kv_heads, shape.head_dim, PAGE, shape.head_dim**-0.5)
        rows = len(pages.lengths)
        queries = torch.randn(rows, shape.num_heads, shape.head_dim, dtype=torch.bfloat16, device="cuda")
        keys, values = (cache[: pages.total] for cache in caches)
        if shape.kernel == "fa3":
            flash = FlashAttention3Decode(shape.kv_heads, shape.head_dim**-0.5, pages.block_table(), pages.lengths.cuda(), kv_dtype=dtype)
            flash.plan()
            return lambda: flash.run(queries.to(dtype), keys, values)
        decode = FlashInferDecode(
            *heads, pages.indptr.cuda(), pages.indices, pages.last.cuda(), buffers.first(rows), own_split=True, kv_dtype=dtype
        )
        decode.mark_empty_rows(pages.lengths.cuda())
        decode.plan(pages.indptr, pages.last)
        return lambda: decode.run(queries, keys, values)

    return build


def _latent_runner(shape: DecodeShape, most_pages: int) -> Builder:
    width = MLA_LATENT_DIM + MLA_ROPE_DIM
    dtype = QUANTISED if shape.quantised else torch.bfloat16
    if shape.quantised and shape.kernel != "flashmla":
        raise ValueError("quantised latents are served with --attention-backend flashmla")
    cache = torch.randn(most_pages, PAGE, width, dtype=torch.bfloat16, device="cuda").to(dtype)
    scale = (128 + MLA_ROPE_DIM) ** -0.5

    def build(pages: Pages) -> Callable[[], object]:
        queries = torch.randn(len(pages.lengths), shape.num_heads, width, dtype=torch.bfloat16, device="cuda").to(dtype)
        lengths, latents = pages.lengths.cuda(), cache[: pages.total]
        if shape.kernel == "flashmla":
            flash = FlashMLADecode(shape.num_heads, scale, pages.block_table(), lengths, kv_dtype=dtype)
            flash.plan()
            return lambda: flash.run(queries, latents, mark_neutral=False)
        decode = FlashInferMLA(shape.num_heads, PAGE, scale, pages.indptr.cuda(), pages.indices, lengths)
        decode.mark_empty_rows(lengths)
        decode.plan(pages.indptr, pages.lengths)
        return lambda: decode.run(queries, latents)

    return build
