"""Writes down every placement together with the loads it was made on, for a comparison with the policy alone.

One JSON line each; the first describes policy and cluster. `benchmark/simulate/replay.py` reads them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_dcp.policy.types import InstanceLoad, Placement, PlacementRequest

LOG_VARIABLE = "SGLANG_DYNCP_PLACEMENT_LOG"
"""Names the file; unset, nothing is written. For measurements: a line per request costs the router tens of microseconds."""


@dataclass(frozen=True)
class PlacementLog:
    """Appends to `path`; every line is on disk when a call returns."""

    path: Path

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> PlacementLog | None:
        """The log that the environment asks for, or None."""
        path = environment.get(LOG_VARIABLE)
        return cls(Path(path)) if path else None

    def begin(self, **cluster: Any) -> None:
        """What make_policy was called with, and the page size."""
        self._append({"cluster": cluster})

    def add(self, time_s: float, rid: str, request: PlacementRequest, loads: Sequence[InstanceLoad], placement: Placement) -> None:
        """One placement at `time_s`, on `loads`."""
        asked = [request.prompt_tokens, request.expected_new_tokens, request.max_new_tokens, request.degree, request.home]
        seen = [[x.node, x.kv_tokens, x.kv_capacity, x.guest_tokens, x.home_requests, x.attention_rows] for x in loads]
        chosen = [placement.home, placement.shards, placement.shard_tokens]
        self._append({"time": time_s, "rid": rid, "request": asked, "loads": seen, "placement": chosen})

    def add_finish(self, time_s: float, rid: str) -> None:
        """The client's answer came at `time_s`, on the clock of the placements."""
        self._append({"time": time_s, "finished": rid})

    def _append(self, entry: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry, separators=(",", ":")) + "\n")
