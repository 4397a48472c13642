"""Control columns of an instance in a step: what every instance tells all others, whether or not it has messages."""

from __future__ import annotations

from collections.abc import Sequence

NUM_COLUMNS = 9
WORDS, DECISIONS, ROWS_CHECKSUM, FREE_PAGES, GUEST_PAGES, KV_TOKENS, HOME_REQUESTS, WANTED_PAGES, STEP = range(NUM_COLUMNS)
"""DECISIONS: digest of what the ledger has decided up to the step before, the same on all instances. GUEST_PAGES and KV_TOKENS leave out
what retained sequences hold. WANTED_PAGES: free pages that the instance needs for itself, where it can get them of retained ones."""

NAMES = (
    "message words",
    "decisions about pages",
    "sharded rows",
    "free pages",
    "guest pages",
    "KV tokens",
    "requests",
    "wanted pages",
    "step",
)
"""Of the columns, for errors."""


def disagreement(columns: Sequence[Sequence[int]], rank: int, step: int, decisions: int) -> str:
    """What the instances' columns say against instance `rank`, which is at `step` with this digest of decisions. One of them does."""
    steps = [row[STEP] for row in columns]
    if any(other != step for other in steps):
        return f"rank {rank} is at step {step}, the others at {steps}"
    others = [other for other, row in enumerate(columns) if row[DECISIONS] != decisions]
    return f"rank {rank}, step {step}: instances {others} decided otherwise about pages in an earlier step"


def slice_disagreement(own: Sequence[int], first: Sequence[int], rank: int, slice_: int) -> str:
    """What a slice of instance `rank` would have told, against what the first one of it told for both."""
    differing = [f"{name} {ours}, not {theirs}" for name, ours, theirs in zip(NAMES, own, first, strict=True) if ours != theirs]
    return f"instance {rank}, slice {slice_}, step {own[STEP]}: went apart from slice 0 in {', '.join(differing)}"
