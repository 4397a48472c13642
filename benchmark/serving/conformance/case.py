"""One question to a server, as data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from testing.client import Client


@dataclass(frozen=True)
class Case:
    """headers: beside the content type. sampled: its text may differ between two runs of stock. documented: why our answer differs, where
    the documentation says so. act: in place of one request, what to do; it returns what is compared."""

    name: str
    path: str = ""
    body: Any = None
    method: str = "POST"
    headers: Mapping[str, str] = field(default_factory=dict)
    sampled: bool = False
    documented: str = ""
    act: Callable[[Client], Any] | None = None


def variants(prefix: str, path: str, base: Mapping[str, Any], changes: Mapping[str, Mapping[str, Any]], **options: Any) -> list[Case]:
    """One case per change of a body; a change to None takes the field out."""
    bodies = {name: {key: value for key, value in {**base, **change}.items() if value is not None} for name, change in changes.items()}
    return [Case(f"{prefix}: {name}", path, body, **options) for name, body in bodies.items()]
