"""What the comparison of a decode server with an aggregated one says of its figures."""

from __future__ import annotations

from typing import Any

import pytest

from benchmark.gpu_runtime.disaggregated import conclude, describe
from benchmark.headline.client import Arrival, Served


def served(gap_s: float, degree: int = 2) -> Served:
    """A hundred events, `gap_s` between two of them."""
    events = [5.0 + gap_s * index for index in range(100)]
    return Served(Arrival(4.0, 1000, 100), sent_s=4.0, first_s=5.0, last_s=events[-1], tokens=99, degree=degree, event_s=events)


def two_servers(decode: Served, steps: dict[str, float]) -> dict[str, Any]:
    aggregated = describe([served(0.2), served(0.01)], {"graph": 500.0, "sharded_graph": 90.0, "eager": 10.0})
    return {"aggregated": aggregated, "decode": describe([decode], steps)}


def test_gaps_are_those_between_two_events_of_a_stream() -> None:
    found = describe([served(0.2), served(0.01)], {})
    assert found["itl_ms"] == {"p50": 10.0, "p99": 200.0, "max": 200.0} and found["ttft_s"] == {"p50": 1.0, "p99": 1.0}
    assert found["degrees"] == {2: 2} and not found["failed"]


@pytest.mark.parametrize(
    ("gap_s", "degree", "eager", "missed"),
    [
        (0.02, 2, 0.0, set()),
        (0.1, 2, 0.0, {"itl_p99_over_aggregated"}),
        (0.02, 2, 1.0, {"sharded_graph_share"}),
        (0.02, 1, 0.0, {"served"}),
    ],
)
def test_bars(gap_s: float, degree: int, eager: float, missed: set[str]) -> None:
    """A decode server prefills nothing: every eager step of it was one with sharded rows. Nobody sharded shows nothing."""
    found = conclude(two_servers(served(gap_s, degree), {"graph": 200.0, "sharded_graph": 99.0, "eager": eager}))
    assert {name for name, held in found["bars"].items() if not held} == missed
    assert found["sharded_graph_share"] == (1.0 if not eager else 0.99) and found["itl_p99_over_aggregated"] == pytest.approx(gap_s / 0.2)
