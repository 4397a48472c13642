"""docs/results/conversations.md: what a cache of prompts is worth, simulated, and served where that was run."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from scripts.result_pages.markdown import RESULTS, load, page, source, table

SIMULATED, DOCUMENTS, SERVED = "conversations_simulated.json", "documents_simulated.json", "conversations_served.json"
LEDGER, MEMORY = "conversations_ledger.json", "ledger_memory.json"


def render() -> str:
    simulated, documents, ledger = load(SIMULATED), load(DOCUMENTS), load(LEDGER)
    memory = load(MEMORY)
    return page(
        "Conversations: what a cache of prompts is worth",
        "## Simulated",
        source(SIMULATED, simulated),
        "Share of prompt tokens found, and seconds of prefill per turn in brackets, by KV tokens per instance. `stock`: SGLang's tree per "
        "instance, turns land anywhere; `sticky`: the same behind our router; `ours`: sequences retained over all pools; `pooled`: the "
        "bound.",
        table(["pool", "stock", "sticky", "ours", "pooled"], _hit_shares(simulated["rows"])),
        "## What is not built",
        "Shares of all prompt tokens. Promotion: found by the simulator, computed anew by a server, because a whole turn left it and a "
        "split one wants it. A home that moves: another home kept more.",
        table(["pool", "promotion", "a home that moves"], _not_built(simulated["rows"])),
        "## Documents",
        "Questions to the same long documents read one copy of each, also while others read it. `shared`: one tree over all pools; "
        "`sticky`: one per instance. Simulated: `ours` has at once what a request that runs is still to compute.",
        source(DOCUMENTS, documents),
        table(["documents of 200,000 tokens", "sticky", "ours", "shared"], _documents(documents["rows"])),
        "## On the ledger alone",
        source(LEDGER, ledger),
        "The protocol's own participants, admission and retention, without a model: four instances, sessions of the trace with shorter "
        "prompts in a closed loop. Bound and sticky router are simulated for the same turns at the same times. Where the bound itself is "
        "less than 1.15 of a sticky router, so is everybody. What is missed was evicted.",
        table(["pool", "seed", "found", "bound", "over the bound", "over sticky", "the bound over sticky"], _on_ledger(ledger["rows"])),
        source(MEMORY, memory),
        f"After {memory['turns']:,} turns the ledger has {memory['bytes_more']} bytes more than the {memory['bytes_after_a_short_walk']:,} "
        "of a short walk, the spare room of its dictionaries included.",
        *_served_part(),
    )


def _hit_shares(rows: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    pools = groupby(rows, key=lambda row: row["pool_tokens"])
    return [(f"{pool:,}", *(f"{row['hit_share']:.3f} ({row['prefill_s_mean']:.1f} s)" for row in of)) for pool, of in pools]


def _not_built(rows: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    names = ("promoted_share", "elsewhere_share")
    return [(f"{row['pool_tokens']:,}", *(f"{100 * row[name]:.2f} %" for name in names)) for row in rows if row["column"] == "ours"]


def _documents(rows: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    counts = groupby(rows, key=lambda row: row["documents"])
    return [(count, *(f"{row['hit_share']:.3f} ({row['prefill_s_mean']:.1f} s)" for row in of)) for count, of in counts]


def _on_ledger(rows: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [
        (
            f"{row['pool_tokens']:,}",
            row["seed"],
            f"{row['hit_share']:.3f}",
            f"{row['simulated']['pooled']:.3f}",
            f"{row['of_bound']:.2f}",
            f"{row['over_sticky']:.2f}",
            f"{row['simulated']['pooled'] / row['simulated']['sticky']:.2f}",
        )
        for row in rows
    ]


def _served_part() -> list[str]:
    """Of real servers with small pools, once they were run."""
    if not (RESULTS / SERVED).exists():
        return []
    served = load(SERVED)
    head = ["pool", "server", "found", "simulated", "sharded", "median TTFT, s", "mean seconds late", "at"]
    more = ("sharded", "ttft_median_s", "late_s_mean", "commit")
    of = {"stock": "stock", "sticky": "sticky", "on": "ours"}
    rows = [
        (row["pool_tokens"], name, server["hit_share"], row["simulated"].get(of.get(name)), *(server.get(key) for key in more))
        for row in served["rows"]
        for name, server in row["servers"].items()
    ]
    bars = [
        (row["pool_tokens"], row["simulated"]["pooled"], row["hit_share_of_bound"], row.get("hit_share_over_sticky"))
        for row in served["rows"]
    ]
    return [
        "## Served",
        "What a later turn gains on a GPU: [conversations and FP8 K/V, measured](memory.md).",
        source(SERVED, served),
        "Four instances on a CPU, sessions of the same trace with shorter prompts. `on`, ours with retained sequences, was sent its turns "
        "in a closed loop; the others, and the simulator, were sent the same turns at the same times, or when a session's last answer was "
        "there. `off`: ours, nothing retained. `stock`: SGLang with its own balancing. `sticky`: SGLang, and the client names for all "
        "turns of a session the instance that had the fewest open sessions when it began; simulated behind our router. Turns that no pool "
        "holds whole are left out: stock would refuse them.",
        table(head, rows),
        table(["pool", "bound", "`on` over the bound", "`on` over `sticky`"], bars),
    ]
