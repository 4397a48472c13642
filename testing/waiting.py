"""Waiting for what a server comes to by itself."""

from __future__ import annotations

import time
from collections.abc import Callable


def wait_until(is_so: Callable[[], object], otherwise: str, limit_s: float = 60.0) -> None:
    """Raises AssertionError with `otherwise` when it is not so within the limit."""
    deadline = time.monotonic() + limit_s
    while not is_so():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.05)
