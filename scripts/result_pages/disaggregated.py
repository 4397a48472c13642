"""docs/results/disaggregated.md: answers of a decode server behind prefill servers, and inter-token times beside a server that prefills."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from scripts.result_pages.markdown import load, notes, page, source, table


def render() -> str:
    result, gpu = load("disaggregated.json"), load("pd.json")
    return page(
        "Behind prefill servers, measured",
        "## Answers, on a CPU",
        source("disaggregated.json", result),
        f"Mooncake over TCP, a decode server of {result['instances']} instances with pools of {result['pool_tokens']:,} tokens, "
        f"{result['at_once']} requests at once, each pinned to a home and a degree. Each output is compared with that of stock SGLang with "
        "one large pool, up to the first near tie: largest difference of log-probabilities, which only tokens that the model is unsure of "
        "can show. A prefill server with this package sends a page to the shard that owns it, stock SGLang sends all of a request to each "
        "of its shards.",
        table(
            [
                "model",
                "prefill server",
                "degree",
                "requests",
                "longest prompt",
                "tokens compared",
                "unsure",
                "other outputs",
                "difference",
                "copies",
            ],
            _rows(result["cases"]),
        ),
        "## Inter-token times, on a GPU",
        source("pd.json", gpu),
        "The same instances, pools and arrivals twice: as a decode server whose K/V are there, and prefilling themselves.",
        table(
            ["server", "requests", "sharded", "P50, ms", "P99, ms", "longest, ms", "P99 over aggregated", "sharded steps as graphs"],
            _times(gpu),
        ),
        notes(gpu["notes"]),
    )


def _times(gpu: dict[str, Any]) -> Iterator[tuple[Any, ...]]:
    for name, found in gpu["servers"].items():
        ours = (gpu["itl_p99_over_aggregated"], gpu["sharded_graph_share"]) if name == "decode" else (None, None)
        sharded = sum(count for degree, count in found["degrees"].items() if int(degree) > 1)
        yield name, found["requests"], sharded, *(found["itl_ms"][key] for key in ("p50", "p99", "max")), *ours


def _rows(cases: list[dict[str, Any]]) -> Iterator[tuple[Any, ...]]:
    for case in cases:
        for degree, found in case["degrees"].items():
            prompt, tokens = f"{found['longest_prompt']:,}", found["tokens_compared"]
            answers = found["requests"], prompt, tokens, found["tokens_unsure"], len(found["other_outputs"]), f"{found['worst']:.1e}"
            yield f"`{case['model']}`", case["prefill"], degree, *answers, f"{found['copies']:g}"
