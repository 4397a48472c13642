"""Host time that our code takes in a scheduler's step: what stands between two steps when the device is fast."""

from __future__ import annotations

import time
from collections import deque

KEPT_STEPS = 1000


class HostClock:
    """Sums the parts of a step that stand in `with clock:`; keeps the last steps that had rows, in microseconds. Parts do not nest."""

    def __init__(self) -> None:
        self._seconds = self._began = 0.0
        self.plain_us: deque[float] = deque(maxlen=KEPT_STEPS)
        self.sharded_us: deque[float] = deque(maxlen=KEPT_STEPS)

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self._seconds += time.perf_counter() - self._began

    def end_step(self, *, ran: bool, sharded: bool) -> None:
        """Called where the next step's part begins: what was measured since belongs to the step that ends."""
        if ran:
            (self.sharded_us if sharded else self.plain_us).append(self._seconds * 1e6)
        self._seconds = 0.0

    def summary(self) -> dict[str, dict[str, float]]:
        """p50 and p90 in microseconds of the steps kept, by kind."""
        return {name: _spread(list(values)) for name, values in (("plain", self.plain_us), ("sharded", self.sharded_us)) if values}


def _spread(values: list[float]) -> dict[str, float]:
    values.sort()
    return {"steps": len(values), "p50_us": round(values[len(values) // 2], 1), "p90_us": round(values[int(0.9 * (len(values) - 1))], 1)}
