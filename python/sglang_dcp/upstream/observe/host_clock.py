"""Host time that our code takes in a scheduler's step: what stands between two steps when the device is fast."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import chain
from typing import Any

KEPT_STEPS = 1000

Parts = dict[str, float]
"""Seconds by part."""


class HostClock:
    """Adds up the parts of a step, which those measure that run them. Keeps the last steps that had rows."""

    def __init__(self) -> None:
        self._parts: Parts = {}
        self._kinds: dict[str, deque[Parts]] = {kind: deque(maxlen=KEPT_STEPS) for kind in ("plain", "sharded")}

    def spent(self, part: str, seconds: float) -> None:
        self._parts[part] = self._parts.get(part, 0.0) + seconds

    def end_step(self, *, ran: bool, sharded: bool) -> None:
        """Called where the next step's part begins: what was measured since belongs to the step that ends."""
        if ran:
            self._kinds["sharded" if sharded else "plain"].append(self._parts)
        self._parts = {}

    def summary(self) -> dict[str, dict[str, Any]]:
        """p50 and p90 of the steps kept, by kind, and of every part of them, with how many had it. Microseconds."""
        return {kind: _spread(steps) for kind, steps in self._kinds.items() if steps}


def _spread(steps: Sequence[Parts]) -> dict[str, Any]:
    totals = sorted(sum(parts.values()) * 1e6 for parts in steps)
    by_part = {name: sorted(parts[name] * 1e6 for parts in steps if name in parts) for name in sorted({*chain(*steps)})}
    return {
        "steps": len(totals),
        "p50_us": _quantile(totals, 0.5),
        "p90_us": _quantile(totals, 0.9),
        "parts_steps": {name: len(values) for name, values in by_part.items()},
        "parts_p50_us": {name: _quantile(values, 0.5) for name, values in by_part.items()},
        "parts_p90_us": {name: _quantile(values, 0.9) for name, values in by_part.items()},
    }


def _quantile(ascending: Sequence[float], share: float) -> float:
    return round(ascending[int(share * len(ascending))], 1)
