"""What placement can gain at most: rates that are found, and what is recorded."""

from __future__ import annotations

import json

import pytest

from benchmark.headline.bounds import EVEN, FACTS, MOST_RATE_PER_GPU, P99, RESULTS, Cluster, latencies, rates
from benchmark.headline.traffic import WEKA

BOUNDS = json.loads((RESULTS / "headline_bounds.json").read_text())
KNOWN = {key: BOUNDS[key] for key in FACTS}
CLUSTER = Cluster(KNOWN, 2, range(1, 3), 10.0)


def test_rows_over_all_instances_are_faster_where_the_exchange_is_free() -> None:
    priced, free = (CLUSTER.means("static-dcp", 0.05, 8.0, is_free=is_free)[P99] for is_free in (False, True))
    assert free < priced
    whole, again = (CLUSTER.means("whole", 0.05, 8.0, is_free=is_free)[P99] for is_free in (False, True))
    assert whole == again, "nothing of it is exchanged"


def test_the_highest_rate_lies_at_the_limit() -> None:
    assert CLUSTER.highest_rate("whole", 0.03, 0.0, is_free=False) == 0.0
    top = 2 * MOST_RATE_PER_GPU
    assert CLUSTER.highest_rate("whole", 0.0, 1e6, is_free=False) == pytest.approx(top, rel=0.02)
    limit = CLUSTER.means("whole", 0.0, 12.0)[P99]
    rate = CLUSTER.highest_rate("whole", 0.0, limit, is_free=False)
    assert CLUSTER.means("whole", 0.0, rate)[P99] <= limit < CLUSTER.means("whole", 0.0, rate + 1.0)[P99]


def test_more_gpus_have_more_arrivals_of_one_draw() -> None:
    """Rates beyond what the comparison itself draws its windows at."""
    assert Cluster(KNOWN, 8, range(1, 2), 5.0).means("whole", 0.0, 100.0)[P99] > 0


def test_over_whole_is_a_ratio_that_is_above_one_where_whole_is_worse() -> None:
    found = rates(CLUSTER, 0.05, 28.0)
    assert found["over_whole"]["ours"] == pytest.approx(found["rates"]["ours"] / found["rates"]["whole"], abs=0.01)
    slow = latencies(CLUSTER, WEKA, 0.6)
    assert slow["over_whole"][EVEN] == pytest.approx(slow["p99_tpot_ms"]["whole"] / slow["p99_tpot_ms"][EVEN], abs=0.01)
    assert slow["p99_tpot_ms"][EVEN] < slow["p99_tpot_ms"]["whole"]


def test_the_results_hold_what_the_simulator_says() -> None:
    """After a change of constants or policy: the command in the file."""
    row = next(row for row in BOUNDS["latencies"] if row["gpus"] == 2)
    cluster = Cluster(KNOWN, 2, range(1, BOUNDS["seeds"] + 1), BOUNDS["seconds"])
    assert latencies(cluster, row["mix"], row["requests_per_s"]) == row
