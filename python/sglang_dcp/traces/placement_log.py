"""Our own placement log (observe/placement_log.py): arrivals and prompts as the router saw them.

It has no output lengths, since the router never knows them: the longest that a request may get is taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sglang_dcp.traces.records import RowError, TraceRequest
from sglang_dcp.traces.values import length, seconds

NAME = "placement-log"
NOTE = "a placement log has no output lengths; each request's max_new_tokens is taken"


def matches(fields: Mapping[str, Any]) -> bool:
    """Whether this is a line of such a log: what describes the cluster, a placement, or the end of a request."""
    return "cluster" in fields or {"rid", "request", "placement"} <= set(fields) or "finished" in fields


def read(fields: Mapping[str, Any]) -> TraceRequest | None:
    """The request of a line, None for a line that holds none. Raises RowError."""
    if "cluster" in fields or "finished" in fields:
        return None
    asked = fields.get("request")
    if not isinstance(asked, list) or len(asked) != 5:
        raise RowError("not an entry of a placement log")
    return TraceRequest(seconds(fields.get("time"), "time"), length(asked[0], "prompt_tokens"), length(asked[2], "max_new_tokens"))
