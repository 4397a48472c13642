"""What placement can gain at most: rates that are found, and what is recorded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmark.headline.bounds import EVEN, MOST_RATE_PER_GPU, P99, Cluster, latencies, rates
from benchmark.headline.traffic import WEKA

RESULTS = Path(__file__).resolve().parents[3] / "benchmark" / "results"
BOUNDS = json.loads((RESULTS / "headline_bounds.json").read_text())
FACTS = {key: BOUNDS[key] for key in ("model", "layers", "pool_tokens", "longest", "longest_output")}
CLUSTER = Cluster(FACTS, 2, range(1, 3), 10.0)


def test_rows_over_all_instances_are_faster_where_the_exchange_is_free() -> None:
    priced, free = (CLUSTER.mean_of(P99, "static-dcp", 0.05, 8.0, is_free=is_free) for is_free in (False, True))
    assert free < priced
    whole, again = (CLUSTER.mean_of(P99, "whole", 0.05, 8.0, is_free=is_free) for is_free in (False, True))
    assert whole == again, "nothing of it is exchanged"


def test_the_highest_rate_lies_at_the_limit() -> None:
    assert CLUSTER.highest_rate("whole", 0.03, 0.0, is_free=False) == 0.0
    top = 2 * MOST_RATE_PER_GPU
    assert CLUSTER.highest_rate("whole", 0.0, 1e6, is_free=False) == pytest.approx(top, rel=0.02)
    limit = CLUSTER.mean_of(P99, "whole", 0.0, 12.0)
    rate = CLUSTER.highest_rate("whole", 0.0, limit, is_free=False)
    assert CLUSTER.mean_of(P99, "whole", 0.0, rate) <= limit < CLUSTER.mean_of(P99, "whole", 0.0, rate + 1.0)


def test_more_gpus_have_more_arrivals_of_one_draw() -> None:
    """Rates beyond what the comparison itself draws its windows at."""
    assert Cluster(FACTS, 8, range(1, 2), 5.0).mean_of(P99, "whole", 0.0, 100.0) > 0


def test_over_whole_is_a_ratio_that_is_above_one_where_whole_is_worse() -> None:
    found = rates(CLUSTER, 0.05, 28.0)
    assert found["over_whole"]["ours"] == pytest.approx(found["rates"]["ours"] / found["rates"]["whole"], abs=0.01)
    slow = latencies(CLUSTER, WEKA, 0.6)
    assert slow["over_whole"][EVEN] == pytest.approx(slow["p99_tpot_ms"]["whole"] / slow["p99_tpot_ms"][EVEN], abs=0.01)
    assert slow["p99_tpot_ms"][EVEN] < slow["p99_tpot_ms"]["whole"]


def test_the_results_hold_what_the_simulator_says() -> None:
    """After a change of constants or policy: the command in the file."""
    row = next(row for row in BOUNDS["latencies"] if row["gpus"] == 2)
    cluster = Cluster(FACTS, 2, range(1, BOUNDS["seeds"] + 1), BOUNDS["seconds"])
    assert latencies(cluster, row["mix"], row["requests_per_s"]) == row
