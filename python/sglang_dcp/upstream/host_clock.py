"""Host time that our code takes in a scheduler's step: what stands between two steps when the device is fast."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from typing import Any

KEPT_STEPS = 1000


class _Kind:
    """The last steps of one kind: all of our code in each, and the sum of each part over them."""

    def __init__(self) -> None:
        self.totals: deque[float] = deque(maxlen=KEPT_STEPS)
        self.parts: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=KEPT_STEPS))


class HostClock:
    """Adds up the parts of a step, each `with clock.part(name):`. Keeps the last steps that had rows. Parts do not nest."""

    def __init__(self) -> None:
        self._name, self._began = "", 0.0
        self._parts: dict[str, float] = {}
        self._kinds = {"plain": _Kind(), "sharded": _Kind()}

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
            kind = self._kinds["sharded" if sharded else "plain"]
            kind.totals.append(sum(self._parts.values()) * 1e6)
            for name, seconds in self._parts.items():
                kind.parts[name].append(seconds * 1e6)
        self._parts = {}

    def summary(self) -> dict[str, dict[str, Any]]:
        """p50 and p90 of the steps kept, by kind, and the p50 of every part of them. Microseconds."""
        return {name: _spread(kind) for name, kind in self._kinds.items() if kind.totals}


def _spread(kind: _Kind) -> dict[str, Any]:
    totals = sorted(kind.totals)
    parts = {name: round(sorted(values)[len(values) // 2], 1) for name, values in kind.parts.items()}
    p50, p90 = totals[len(totals) // 2], totals[int(0.9 * len(totals))]
    return {"steps": len(totals), "p50_us": round(p50, 1), "p90_us": round(p90, 1), "parts_p50_us": parts}
