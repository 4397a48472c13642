"""The report as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def format_instances(instances: Sequence[dict[str, Any]]) -> str:
    """One line per instance, and how even they are (largest / mean; 1.00 is even)."""
    rows = [["instance", "KV tokens", "of pool", "guest tokens", "home requests", "queued"]]
    for load in instances:
        share = f"{100 * load['kv_tokens'] / load['pool_tokens']:.0f} %"
        counts = (load["guest_tokens"], load["home_requests"], load["queued"])
        rows.append([str(load["rank"]), f"{load['kv_tokens']:,}", share, *(f"{count:,}" for count in counts)])
    tokens, requests = ([load[key] for load in instances] for key in ("kv_tokens", "home_requests"))
    return f"{align(rows)}\nlargest / mean: KV tokens {balance(tokens)}, home requests {balance(requests)}"


def balance(values: Sequence[int]) -> str:
    return f"{max(values) * len(values) / sum(values):.2f}" if sum(values) else "-"


def format_requests(requests: Sequence[dict[str, Any]]) -> str:
    """One line per request; shards in sequence order, the tail last."""
    rows = [["request", "state", "prompt", "output", "home", "degree", "shards (instance:tokens)"]]
    for entry in requests:
        start, end = entry["degree_start"], entry["degree_end"]
        degree = str(end) if start == end else f"{start} -> {end}"
        shards = " ".join(f"{shard['rank']}:{shard['tokens']}" for shard in entry["shards"])
        lengths = (entry["prompt_tokens"], entry["output_tokens"])
        rows.append([entry["rid"], entry["state"], *(f"{length:,}" for length in lengths), str(entry["home"]), degree, shards])
    return align(rows)


def align(rows: Sequence[Sequence[str]]) -> str:
    """Columns of equal width, two blanks between them."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
