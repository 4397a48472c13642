"""The protocol behind prefill servers under random load: pages, then K/V some steps later, then the first token; aborts at any of these."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from sglang_dcp.upstream.step import attached
from testing.protocol.decode_queue import without_devices
from testing.protocol.decode_server import DecodeServerModel
from testing.protocol.model import random_walk


@pytest.fixture(autouse=True)
def beside_sglang(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    without_devices(monkeypatch)
    yield
    attached.attach(None)


LIMITS = [
    {"cache_fraction": 0.0},
    {"cache_fraction": 0.8},
    {"cache_fraction": 0.8, "max_degree": 2},
    {"cache_fraction": 0.5, "max_guest_fraction": 0.5},
]


@pytest.mark.parametrize("limits", LIMITS, ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_a_walk(seed: int, limits: dict[str, float]) -> None:
    model = DecodeServerModel(seed, 3, 24, 4, **limits)  # type: ignore[arg-type]
    random_walk(model, 500, arrival=0.25, abort=0.06)


@pytest.mark.parametrize("seed", range(2))
def test_a_walk_over_pools_that_leave_pages_to_growth(seed: int) -> None:
    model = DecodeServerModel(seed, 2, 300, 2)
    assert model.homes[0].participant.limits.left_to_growth(0)
    random_walk(model, 400, arrival=0.4, abort=0.1, most_waiting=12)
