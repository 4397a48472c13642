"""What the report says about our host time: totals of steps by kind, and where they went."""

from sglang_dcp.upstream.observe.host_clock import HostClock


def test_parts_add_up_to_steps_of_their_kind() -> None:
    clock = HostClock()
    for sharded, extra in ((False, 0.0), (True, 40e-6), (True, 0.0), (True, 50e-6)):
        clock.spent("columns", 10e-6)
        clock.spent("columns", 5e-6)
        if extra:
            clock.spent("tables", extra)
        clock.end_step(ran=True, sharded=sharded)
    clock.spent("columns", 1e-3)
    clock.end_step(ran=False, sharded=False)
    found = clock.summary()
    columns = {"columns": 15.0}
    by_part = {"parts_steps": {"columns": 1}, "parts_p50_us": columns, "parts_p90_us": columns}
    assert found["plain"] == {"steps": 1, "p50_us": 15.0, "p90_us": 15.0, **by_part}
    parts = {"columns": 15.0, "tables": 50.0}
    by_part = {"parts_steps": {"columns": 3, "tables": 2}, "parts_p50_us": parts, "parts_p90_us": parts}
    assert found["sharded"] == {"steps": 3, "p50_us": 55.0, "p90_us": 65.0, **by_part}
    assert HostClock().summary() == {}
