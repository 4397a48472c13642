"""What an instance remembers about requests that ended."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

KEPT = 1000
"""Finished requests that an instance remembers, and that a report shows."""
LONGEST_ID = 128
"""Characters of a request id that are kept; clients choose ids of any length, and an instance remembers many."""


def short_id(request_id: str) -> str:
    """The id as it stands in a report."""
    return request_id[:LONGEST_ID]


class RequestLog:
    """The last `KEPT` entries. An entry: rid, state, finish_reason, prompt_tokens, output_tokens, time (seconds since 1970), and home,
    shards, degree_start, degree_end as in meta_info.dyncp."""

    def __init__(self, kept: int = KEPT) -> None:
        self._entries: deque[dict[str, Any]] = deque(maxlen=kept)

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self._entries)

    def add(self, entry: dict[str, Any]) -> None:
        self._entries.append(entry)


def merge_requests(reports: list[dict[str, Any]], request_id: str | None = None) -> list[dict[str, Any]]:
    """Requests of all instances' reports: those under way first, then the last `KEPT` that ended, newest first."""
    live = [entry for report in reports for entry in report["running"]]
    ended = sorted((entry for report in reports for entry in report["finished"]), key=lambda entry: -entry["time"])[:KEPT]
    if request_id is None:
        return live + ended
    request_id = short_id(request_id)
    # Requests of one batch are named after it: ID_0, ID_1 ... as SGLang does.
    return [entry for entry in live + ended if entry["rid"] == request_id or entry["rid"].startswith(f"{request_id}_")]
