"""What a home counts for the metrics."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class LedgerCounters:
    """Of this home's requests. admission_waits: seconds from the ask to the grant, since somebody last took them."""

    degree_growths: int = 0
    retractions: int = 0
    admission_waits: list[float] = field(default_factory=list)
