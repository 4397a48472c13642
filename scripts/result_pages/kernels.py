"""docs/results/kernels.md: sgl-kernel-dcp against its bars, on two machines with the same card."""

from __future__ import annotations

from typing import Any

from scripts.result_pages.markdown import load, page, source, table

WHAT = {
    "tables_us": "tables of a step of 256 rows, us",
    "exchange_fixed_us": "exchange of 8 DeepSeek-V3 rows on 4 shards, beyond the bytes at copy bandwidth, us",
    "exchange_one_home_fixed_us": "the same, all rows of one home, us",
    "exchange_before_absorption_total_us": "exchange of queries before absorption, us",
    "exchange_two_gpus_total_us": "exchange over NVLink, DeepSeek-V3 rows, us",
    "exchange_gqa_two_gpus_total_us": "exchange over NVLink, Qwen3 rows, us",
    "merge_copy_share": "merge, share of the copy bandwidth",
    "partial_gqa_ratio": "partial GQA attention over FlashInfer's whole, worst shape",
    "mla_decode_ns_per_token": "MLA decode, 128 heads, 8 x 65,536 tokens, ns per token",
    "mla_decode_speedup": "MLA decode over FlashInfer's",
}


def render() -> str:
    here, other, default = load("kernels.json"), load("kernels_other_machine.json"), load("default_kernel.json")
    rows = [(f"`{key}`: {what}", _bar(here, key), _number(here.get(key)), _number(other.get(key))) for key, what in WHAT.items()]
    shapes = [(shape, here["mla_decode_by_shape"][shape], here["mla_decode_by_shape"][f"{shape}, FlashInfer"]) for shape in _shapes(here)]
    return page(
        "Kernels, measured",
        source("kernels.json", here),
        table(["key", "bar", "measured", "another machine, same card"], rows),
        "MLA decode by shape, ns per token:",
        table(["requests x tokens", "FlashMLA", "FlashInfer"], shapes),
        "## Long rows, by kernel and split",
        source("default_kernel.json", default),
        f"Captured decode of one layer, {default['shape']}, microseconds, with a kernel's own split of long rows and with ours; for `fa3` "
        "ours is a schedule made once per step, outside of these times. `fa3` is what SGLang runs on Hopper where nobody names a backend. "
        "The last four are of one length, whole (11 of 70,000) and halved (22 of 35,000): of all but the whole ones FlashAttention's own "
        "rule leaves multiprocessors idle.",
        table(["rows", "`fa3`, its own", "`fa3`, ours", "FlashInfer, its own", "FlashInfer, ours"], map(_default, default["rows"])),
    )


def _shapes(result: dict[str, Any]) -> list[str]:
    return [shape for shape in result["mla_decode_by_shape"] if not shape.endswith("FlashInfer")]


def _bar(result: dict[str, Any], key: str) -> str | None:
    bar = result["bars"].get(key)
    return None if bar is None else f"{bar['bar']}{'' if bar['met'] else ' (missed)'}"


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:.3g}"


def _default(row: dict[str, Any]) -> tuple[Any, ...]:
    beside = f", one of {row['longest']:,}" if row["longest"] else ""
    us = row["us"]
    return f"{row['rows']} of {row['tokens']:,}{beside}", us["fa3"], us["fa3, ours"], us["FlashInfer"], us["ours"]
