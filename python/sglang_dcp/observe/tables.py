"""The report as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def format_instances(instances: Sequence[dict[str, Any]]) -> str:
    """One line per instance, and how even they are (largest / mean; 1.00 is even)."""
    rows = [["instance", "KV tokens", "of pool", "guest tokens", "home requests", "queued"]]
    for load in instances:
        share = f"{100 * load['kv_tokens'] / load['pool_tokens']:.0f} %"
        counts = (load["guest_tokens"], load["home_requests"], load["queued"])
        rows.append([instance_name(load), f"{load['kv_tokens']:,}", share, *(f"{count:,}" for count in counts)])
    tokens, requests = (balance([load[key] for load in instances]) for key in ("kv_tokens", "home_requests"))
    return f"{align(rows)}\nlargest / mean: KV tokens {_ratio(tokens)}, home requests {_ratio(requests)}"


def instance_name(load: Mapping[str, Any]) -> str:
    """Its rank, and its node where there are several."""
    return f"{load['rank']} (node {load['node']})" if "node" in load else str(load["rank"])


def balance(values: Sequence[int]) -> float | None:
    """Largest over mean; None where all are zero."""
    return max(values) * len(values) / sum(values) if sum(values) else None


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def format_requests(requests: Sequence[dict[str, Any]]) -> str:
    """One line per request; shards in sequence order, the tail last."""
    rows = [["request", "state", "prompt", "output", "home", "degree", "shards (instance:tokens)"]]
    for entry in requests:
        lengths = (f"{entry[name]:,}" for name in ("prompt_tokens", "output_tokens"))
        rows.append([printable(entry["rid"]), entry["state"], *lengths, str(entry["home"]), degree_text(entry), shards_text(entry)])
    return align(rows)


def degree_text(entry: Mapping[str, Any]) -> str:
    start, end = entry["degree_start"], entry["degree_end"]
    return str(end) if start == end else f"{start} -> {end}"


def shards_text(entry: Mapping[str, Any]) -> str:
    return " ".join(f"{shard['rank']}:{shard['tokens']}" for shard in entry["shards"])


def printable(text: str) -> str:
    """A client's text without what a terminal would obey: escape sequences, line ends, marks that turn the direction of writing."""
    return "".join(character if character.isprintable() else "?" for character in text)


def align(rows: Sequence[Sequence[str]]) -> str:
    """Columns of equal width, two blanks between them."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
