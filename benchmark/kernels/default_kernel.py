"""What a long row costs: SGLang's default kernel on Hopper (fa3) and FlashInfer, with their own split and with ours.

    python -m benchmark.kernels.default_kernel --output OUT.json [--commit ID]

A server that names no backend runs fa3 in steps in which nobody is sharded, and in graphs with sharded rows. The block table is as
wide as a server's of LONGEST_CONTEXT tokens, and stock schedules nothing ahead: with data-parallel attention SGLang does not. Answers are
compared first. plan_us: our schedule of a step, once for all its layers.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmark.multi_gpu.model_shapes import LONGEST_CONTEXT
from benchmark.serving.provenance import provenance
from sglang_dcp.dataflow.attention.flash_schedule import schedule_on
from sglang_dcp.dataflow.attention.flash_splits import FLASHES_OWN_SPLITS, has_causal_schedule, splits_of
from sglang_dcp.dataflow.attention.flashinfer_graph import FlashInferDecode
from sglang_dcp.dataflow.measure.decode_rows import CASES, NODES, PAGE, REPEATS, Case, Pages
from sglang_dcp.dataflow.measure.timing import graph_microseconds

HEADS, KV_HEADS, HEAD_DIM = 32, 4, 128
WHOLE_CASES = (
    *(Case(case.requests, case.tokens_per_request, case.longest_row, 0) for case in CASES if case.padding),
    *(Case(rows, tokens, padding=0) for rows, tokens in ((11, 70_000), (22, 35_000), (34, 20_000), (40, 30_000))),
)
"""The last ones: rows of a length, whole and halved, for which even parts do not come out even over the multiprocessors."""


def run_default(pages: Pages, queries: torch.Tensor, caches: Sequence[torch.Tensor], *, own_split: bool) -> Callable[[], torch.Tensor]:
    """own_split: with our schedule, made ahead of the layers as it is in a server's graphs."""
    from sgl_kernel.flash_attn import flash_attn_with_kvcache

    table, lengths = pages.block_table(-(-LONGEST_CONTEXT // PAGE)), pages.lengths.cuda()
    starts = torch.arange(len(lengths) + 1, dtype=torch.int32, device="cuda")
    num_splits, metadata = FLASHES_OWN_SPLITS, None
    if own_split:
        num_splits = splits_of("cuda", KV_HEADS, own_split=True)
        schedule = schedule_on("cuda", len(lengths), KV_HEADS, caches[0].dtype, causal=has_causal_schedule(HEAD_DIM))
        schedule.plan(lengths)
        metadata = schedule.metadata

    def run() -> torch.Tensor:
        return flash_attn_with_kvcache(
            q=queries,
            k_cache=caches[0],
            v_cache=caches[1],
            page_table=table,
            cache_seqlens=lengths,
            cu_seqlens_q=starts,
            max_seqlen_q=1,
            softmax_scale=HEAD_DIM**-0.5,
            causal=True,
            num_splits=num_splits,
            scheduler_metadata=metadata,
        )

    return run


def run_ours(pages: Pages, queries: torch.Tensor, caches: Sequence[torch.Tensor], *, own_split: bool) -> Callable[[], torch.Tensor]:
    shape = (HEADS, KV_HEADS, HEAD_DIM, PAGE, HEAD_DIM**-0.5)
    decode = FlashInferDecode(*shape, pages.indptr.cuda(), pages.indices, pages.last.cuda(), own_split=own_split)
    decode.mark_empty_rows(pages.lengths.cuda())
    decode.plan(pages.indptr, pages.last)
    return lambda: decode.run(queries, *caches).output


def measure(limit_s: float) -> list[dict[str, Any]]:
    """One entry per case, microseconds by kernel; none begun after `limit_s` seconds."""
    most = max(sum(-(-tokens // PAGE) for tokens in case.lengths()) for case in WHOLE_CASES)
    caches = [torch.randn(most, PAGE, KV_HEADS, HEAD_DIM, dtype=torch.bfloat16, device="cuda") for _ in "kv"]
    ends, found = time.monotonic() + limit_s, []
    for case in WHOLE_CASES:
        if time.monotonic() > ends:
            break
        pages = Pages(case.lengths())
        queries = torch.randn(len(pages.lengths), HEADS, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
        held = [cache[: pages.total] for cache in caches]
        runs: dict[str, Callable[[], torch.Tensor]] = {
            "fa3": run_default(pages, queries, held, own_split=False),
            "fa3, ours": run_default(pages, queries, held, own_split=True),
            "FlashInfer": run_ours(pages, queries, held, own_split=False),
            "ours": run_ours(pages, queries, held, own_split=True),
        }
        for name in ("fa3", "fa3, ours"):
            torch.testing.assert_close(runs[name](), runs["ours"](), rtol=2e-2, atol=2e-2)
        times = {name: round(graph_microseconds([run], nodes=NODES, repeats=REPEATS), 2) for name, run in runs.items()}
        schedule = schedule_on("cuda", len(pages.lengths), KV_HEADS, torch.bfloat16)
        plan = partial(schedule.plan, pages.lengths.cuda())
        found.append({"rows": case.requests, "tokens": case.tokens_per_request, "longest": case.longest_row, "us": times})
        found[-1]["plan_us"] = round(graph_microseconds([plan], nodes=NODES, repeats=REPEATS), 2)
        print(json.dumps(found[-1]), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--commit", default=None, help="commit to record where the tree has no git history")
    parser.add_argument("--limit", type=float, default=80.0, help="seconds")
    arguments = parser.parse_args()
    result = provenance("python -m benchmark.kernels.default_kernel")
    result["commit"] = arguments.commit or result["commit"]
    result |= {"machine": torch.cuda.get_device_name(), "shape": f"{HEADS}/{KV_HEADS} x {HEAD_DIM}", "rows": measure(arguments.limit)}
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
