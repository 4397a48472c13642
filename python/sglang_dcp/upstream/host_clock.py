"""Host time that our code takes in a scheduler's step: what stands between two steps when the device is fast."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from itertools import chain
from typing import Any

KEPT_STEPS = 1000


Parts = dict[str, float]
"""Seconds by part."""


class HostClock:
    """Adds up the parts of a step, each `with clock.part(name):`. Keeps the last steps that had rows. Parts do not nest."""

    def __init__(self) -> None:
        self._name, self._began = "", 0.0
        self._parts: Parts = {}
        self._kinds: dict[str, deque[Parts]] = {kind: deque(maxlen=KEPT_STEPS) for kind in ("plain", "sharded")}

    def part(self, name: str) -> HostClock:
        self._name = name
        return self

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self._parts[self._name] = self._parts.get(self._name, 0.0) + time.perf_counter() - self._began

    def end_step(self, *, ran: bool, sharded: bool) -> None:
        """Called where the next step's part begins: what was measured since belongs to the step that ends."""
        if ran:
            self._kinds["sharded" if sharded else "plain"].append(self._parts)
        self._parts = {}

    def summary(self) -> dict[str, dict[str, Any]]:
        """p50 and p90 of the steps kept, by kind, and the p50 of every part of them. Microseconds."""
        return {kind: _spread(steps) for kind, steps in self._kinds.items() if steps}


def _spread(steps: Sequence[Parts]) -> dict[str, Any]:
    totals = sorted(sum(parts.values()) * 1e6 for parts in steps)
    by_part = {name: sorted(parts[name] * 1e6 for parts in steps if name in parts) for name in sorted({*chain(*steps)})}
    return {
        "steps": len(totals),
        "p50_us": round(totals[len(totals) // 2], 1),
        "p90_us": round(totals[int(0.9 * len(totals))], 1),
        "parts_p50_us": {name: round(values[len(values) // 2], 1) for name, values in by_part.items()},
    }
