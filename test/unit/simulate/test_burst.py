"""A burst goes to all homes in turn, however late reports and requests arrive; what has been taken in counts once."""

from __future__ import annotations

import json

import pytest

from benchmark.simulate.burst import BurstSettings, main, place_burst
from sglang_dcp.policy.cost_model import load_cost_model
from sglang_dcp.policy.placement import make_policy


def new_policy():
    cost = load_cost_model("cpu", 4)
    return make_policy("dual-balance", num_instances=4, page_size=16, cost_model=cost, degree=None, max_degree=4, max_guest_fraction=1.0)


@pytest.mark.parametrize("report_every_ms", [0.2, 1.0, 10.0, 1000.0])
@pytest.mark.parametrize("delivery_ms", [0.0, 0.3, 5.0, 500.0])
def test_a_burst_of_eight_goes_to_all_homes_in_turn(report_every_ms: float, delivery_ms: float) -> None:
    arrivals = [(17 / 7 * index, 64, 8) for index in range(8)]
    settings = BurstSettings(report_every_ms=report_every_ms, delivery_ms=delivery_ms)
    assert [p.home for p in place_burst(arrivals, new_policy(), settings, 4)] == [0, 1, 2, 3, 0, 1, 2, 3]


def test_what_is_under_way_takes_room_of_its_shards_too() -> None:
    """Long prompts are split; whatever was taken in already, those behind see the same loads as if all had been."""
    arrivals = [(float(index), 1500 if index % 3 == 0 else 100, 64) for index in range(8)]
    late = place_burst(arrivals, new_policy(), BurstSettings(delivery_ms=1e6), 4)
    assert place_burst(arrivals, new_policy(), BurstSettings(report_every_ms=0.1, delivery_ms=0.0), 4) == late
    assert late[0].degree > 1 and late[1].degree == 1


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--requests", "8", "--within-ms", "17"]) == 0
    assert json.loads(capsys.readouterr().out)["homes"] == [0, 1, 2, 3, 0, 1, 2, 3]
    assert main(["--report-every-ms", "0"]) == 2
    assert "report_every_ms 0" in capsys.readouterr().err
