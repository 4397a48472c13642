"""A long row beside many short ones in a captured decode: microseconds per layer with FlashInfer's own budget and with ours.

    python -m benchmark.kernels.split --output OUT.json [--commit ID]

Rows of 1,000 tokens beside one long row, and 64 rows of padding, as a decode graph with guest rows has them. `long_row_ratio`: the longest
row beside the most rows, over its time alone plus theirs. Every case is compared with FlashInfer's answer first.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmark.serving.provenance import provenance
from sglang_dcp.dataflow.attention import split_budget
from sglang_dcp.dataflow.attention.flashinfer_graph import FlashInferDecode, FlashInferMLA
from sglang_dcp.dataflow.attention.flashmla import FlashMLADecode
from sglang_dcp.dataflow.measure.decode_rows import NODES, PADDING, PAGE, SHORT, Case, Pages
from sglang_dcp.dataflow.measure.timing import graph_microseconds

ROWS, LONGEST = (1, 16, 48, 66, 128), (4_000, 100_000, 300_000)
GQA_SHAPES = {"32/4 x 128": (32, 4), "16/2 x 128": (16, 2), "64/8 x 128": (64, 8), "64/4 x 128": (64, 4)}
MLA_HEADS, LATENT, ROPE = 128, 512, 64
SHARES = (2, 4, 8)


def lengths(rows: int, longest: int, padding: int) -> list[int]:
    """`rows` rows, the last of them the long one, then padding. longest 0: the short ones alone."""
    return Case(rows, SHORT, longest, padding).lengths()


def build(shape: tuple[int, int], pages: Pages, *, own: bool) -> FlashInferDecode:
    decode = FlashInferDecode(*shape, 128, PAGE, 128**-0.5, pages.indptr.cuda(), pages.indices, pages.last.cuda(), own_split=own)
    decode.mark_empty_rows(pages.lengths.cuda())
    decode.plan(pages.indptr, pages.last)
    return decode


def measure_gqa(shape: tuple[int, int], tokens: Sequence[int], caches: tuple[torch.Tensor, torch.Tensor]) -> dict[str, float]:
    """Times by budget: FlashInfer's own, then ours for every number of shares."""
    pages = Pages(tokens)
    keys, values = (cache[: pages.total].view(pages.total, PAGE, shape[1], 128) for cache in caches)
    queries = torch.randn(len(tokens), shape[0], 128, dtype=torch.bfloat16, device="cuda")
    decode, times = build(shape, pages, own=False), {}
    expected = [part.clone() for part in (decode.run(queries, keys, values).output, decode._natural_lse)]
    times["stock"] = graph_microseconds([lambda: decode.run(queries, keys, values)], nodes=NODES, repeats=15)
    for number in SHARES:
        split_budget.SHARES_PER_SM = number
        ours = build(shape, pages, own=True)
        state = ours.run(queries, keys, values)
        full = pages.lengths.cuda() > 0
        torch.testing.assert_close(state.output[full], expected[0][full], rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(state.lse[full], expected[1][full], rtol=1e-3, atol=1e-3)
        assert bool((state.lse[~full] == float("-inf")).all())
        times[f"shares {number}"] = graph_microseconds([lambda: ours.run(queries, keys, values)], nodes=NODES, repeats=15)  # noqa: B023
    return {name: round(value, 2) for name, value in times.items()}


def measure_mla(tokens: Sequence[int], cache: torch.Tensor) -> dict[str, float]:
    """FlashInfer's and FlashMLA's schedules, as they are: whether they have such a wall."""
    pages, scale = Pages(tokens), (128 + ROPE) ** -0.5
    latents = cache[: pages.total].view(pages.total, PAGE, LATENT + ROPE)
    queries = torch.randn(len(tokens), MLA_HEADS, LATENT + ROPE, dtype=torch.bfloat16, device="cuda")
    found = {}
    flashinfer = FlashInferMLA(MLA_HEADS, PAGE, scale, pages.indptr.cuda(), pages.indices, pages.lengths.cuda())
    flashinfer.plan(pages.indptr, pages.lengths)
    found["FlashInfer"] = graph_microseconds([lambda: flashinfer.run(queries, latents)], nodes=NODES, repeats=10)
    if importlib.util.find_spec("flash_mla") is None:
        return {name: round(value, 2) for name, value in found.items()}
    flash_mla = FlashMLADecode(MLA_HEADS, scale, pages.block_table(), pages.lengths.cuda())
    flash_mla.plan()
    found["FlashMLA"] = graph_microseconds([lambda: flash_mla.run(queries, latents, mark_neutral=False)], nodes=NODES, repeats=10)
    return {name: round(value, 2) for name, value in found.items()}


def ratio(table: dict[str, dict[str, float]], budget: str) -> float:
    """The longest row beside the most rows, over its time alone plus theirs."""
    rows, longest = ROWS[-1] + 1, LONGEST[-1]
    beside, alone, others = table[f"{rows} rows, {longest}"], table[f"1 rows, {longest}"], table[f"{ROWS[-1]} rows, 0"]
    return round(beside[budget] / (alone[budget] + others[budget]), 3)


def measure(with_mla: bool) -> dict[str, Any]:
    most = lengths(ROWS[-1] + 1, LONGEST[-1], 0)
    pages = sum(-(-tokens // PAGE) for tokens in most)
    caches = tuple(torch.randn(pages, PAGE * 8 * 128, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    found: dict[str, Any] = {"gqa": {}}
    cases = [*((rows, longest) for rows in ROWS for longest in LONGEST), (ROWS[-1] + 1, LONGEST[-1]), (ROWS[-1], 0), (32, 0)]
    for name, shape in GQA_SHAPES.items():
        width = PAGE * shape[1] * 128
        views = tuple(cache.view(-1)[: pages * width].view(pages, width) for cache in caches)
        few = cases if name == "32/4 x 128" else cases[-3:] + [(1, LONGEST[-1]), (66, LONGEST[-1])]
        table = {f"{rows} rows, {longest}": measure_gqa(shape, lengths(rows, longest, PADDING), views) for rows, longest in few}  # type: ignore[arg-type]
        found["gqa"][name] = {"us": table, "long_row_ratio": {b: ratio(table, b) for b in ("stock", *(f"shares {n}" for n in SHARES))}}
        print(name, json.dumps(found["gqa"][name]), flush=True)
    if with_mla:
        cache = torch.randn(pages, PAGE * (LATENT + ROPE), dtype=torch.bfloat16, device="cuda")
        few = [*cases[-3:], (1, LONGEST[-1])]
        table = {f"{rows} rows, {longest}": measure_mla(lengths(rows, longest, 0), cache) for rows, longest in few}
        found["mla"] = {"us": table, "long_row_ratio": {b: ratio(table, b) for b in next(iter(table.values()))}}
        print("mla", json.dumps(found["mla"]), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--commit", default=None, help="commit to record where the tree has no git history")
    parser.add_argument("--without-mla", action="store_true")
    arguments = parser.parse_args()
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    result = provenance("python -m benchmark.kernels.split")
    result["commit"] = arguments.commit or result["commit"]
    result["machine"] = torch.cuda.get_device_name()
    result |= measure(not arguments.without_mla)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
