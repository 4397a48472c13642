"""What a trace is once it is read: requests in order of arrival, and what was left out.

Standard library only: `sglang-dcp plan` and the simulator read the same traces by the same code.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

NUM_NAMED_ROWS = 3


class TraceRequest(NamedTuple):
    """One request. Lengths are tokens, at least 1. blocks: ids of the prompt's blocks, where the file has them; equal ones stand for equal
    tokens behind equal beginnings."""

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class SkippedRow:
    """A row that cannot be used: where it stands in its file, and why."""

    where: str
    reason: str


class RowError(ValueError):
    """A row cannot be used; the message is the reason."""


class Record(NamedTuple):
    """One row of a file before it is understood: `where` ("line 3"), and its fields by name."""

    where: str
    fields: Mapping[str, Any]


@dataclass(frozen=True)
class Trace:
    """`requests` are sorted by arrival and begin at 0 s; those that share an arrival lie anywhere in the `tick_s` seconds after it.

    `block_tokens`: of one block of theirs, 0 where the file has none.
    `notes` are sentences about what the file does not say and what was assumed.
    """

    name: str
    format: str
    requests: tuple[TraceRequest, ...]
    skipped: tuple[SkippedRow, ...] = ()
    tick_s: float = 0.0
    notes: tuple[str, ...] = ()
    block_tokens: int = 0

    @property
    def span_s(self) -> float:
        """Seconds over which the requests arrive, the gap after the last one included: requests / span_s is their rate."""
        count = len(self.requests)
        return self.requests[-1].arrival_s * count / (count - 1) if count > 1 else 0.0

    def describe(self) -> list[str]:
        """Lines for the user: format, size, assumptions, and the rows that were left out, a few of each reason by name."""
        rate = f", {len(self.requests) / self.span_s:.3g} requests/s" if self.span_s else ""
        lines = [f"{self.name}: {self.format}, {len(self.requests)} requests{rate}", *self.notes]
        if self.tick_s:
            lines.append(f"arrivals come in ticks of {self.tick_s:g} s; requests of a tick are spread over it")
        for reason, count in Counter(row.reason for row in self.skipped).most_common(10):
            places = [row.where for row in self.skipped if row.reason == reason][:NUM_NAMED_ROWS]
            more = f" and {count - len(places)} more" if count > len(places) else ""
            lines.append(f"skipped {count} of {len(self.requests) + len(self.skipped)} rows: {reason} ({', '.join(places)}{more})")
        return lines
