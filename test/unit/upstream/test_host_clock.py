"""What the report says about our host time: totals of steps by kind, and where they went."""

import pytest

from sglang_dcp.upstream import host_clock
from sglang_dcp.upstream.host_clock import HostClock


def test_parts_add_up_to_steps_of_their_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(host_clock.time, "perf_counter", lambda: now[0])
    clock = HostClock()

    def spend(name: str, microseconds: float) -> None:
        with clock.part(name):
            now[0] += microseconds * 1e-6
        now[0] += 1.0  # between our parts: not ours

    for sharded, extra in ((False, 0.0), (True, 30.0), (True, 50.0)):
        spend("columns", 10.0)
        spend("columns", 5.0)
        if extra:
            spend("tables", extra)
        clock.end_step(ran=True, sharded=sharded)
    spend("columns", 1000.0)
    clock.end_step(ran=False, sharded=False)
    found = clock.summary()
    assert found["plain"] == {"steps": 1, "p50_us": 15.0, "p90_us": 15.0, "parts_p50_us": {"columns": 15.0}}
    assert found["sharded"] == {"steps": 2, "p50_us": 65.0, "p90_us": 65.0, "parts_p50_us": {"columns": 15.0, "tables": 50.0}}
    assert HostClock().summary() == {}
