"""Replays a burst of arrivals on the router's own view of a cluster: where does each request go while reports and requests are under way?

    python -m benchmark.simulate.burst --requests 8 --within-ms 17

The engine (engine.py) places on loads that are always up to date. A router does not have those: it reads what each instance wrote last, and
what it has sent arrives later. Here that view (policy/cluster_view.py) is the served one.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from sglang_dcp.policy.cluster_view import ClusterView, HomeReport
from sglang_dcp.policy.cost_model import load_cost_model
from sglang_dcp.policy.expected_output import expected_new_tokens
from sglang_dcp.policy.placement import make_policy
from sglang_dcp.policy.types import Placement, PlacementPolicy, PlacementRequest


@dataclass(frozen=True, slots=True)
class BurstSettings:
    """report_every_ms: an instance writes its report once per step. delivery_ms: a request's way from the router to its home."""

    num_instances: int = 4
    instances_per_node: int = 8
    pool_tokens: int = 1024
    page_size: int = 16
    report_every_ms: float = 10.0
    delivery_ms: float = 1.0

    def __post_init__(self) -> None:
        if self.report_every_ms <= 0 or self.delivery_ms < 0:
            raise ValueError(f"report_every_ms {self.report_every_ms} must be above 0, delivery_ms {self.delivery_ms} not below it")


def place_burst(
    arrivals: Sequence[tuple[float, int, int]], policy: PlacementPolicy, settings: BurstSettings, largest_degree: int
) -> list[Placement]:
    """Placements of arrivals (milliseconds, prompt tokens, max_new_tokens), in order of time. None of them ends within the burst."""
    view = ClusterView([rank // settings.instances_per_node for rank in range(settings.num_instances)])
    sent: list[list[tuple[float, Placement]]] = [[] for _ in range(settings.num_instances)]
    placements = []
    for now, prompt, max_new in arrivals:
        written = now // settings.report_every_ms * settings.report_every_ms
        for home, own in enumerate(sent):
            report = _report([placement for at, placement in own if at + settings.delivery_ms <= written])
            view.take_report(home, settings.pool_tokens, report)
        request = PlacementRequest(prompt, expected_new_tokens(max_new, largest_degree), max_new)
        placement = policy.place(request, view.loads(), settings.page_size)
        view.place(placement)
        sent[placement.home].append((now, placement))
        placements.append(placement)
    return placements


def _report(taken_in: Sequence[Placement]) -> HomeReport:
    tokens: Counter[int] = Counter()
    for placement in taken_in:
        tokens.update(dict(zip(placement.shards, placement.shard_tokens, strict=True)))
    return HomeReport(len(taken_in), len(taken_in), dict(tokens))


def main(arguments: list[str] | None = None) -> int:
    """Prints homes and degrees of a burst of equal requests as JSON; 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m benchmark.simulate.burst", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--within-ms", type=float, default=17.0, help="the burst's length (default 17)")
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--max-new", type=int, default=256)
    parser.add_argument("--instances", type=int, default=4)
    parser.add_argument("--pool-tokens", type=int, default=1024)
    parser.add_argument("--report-every-ms", type=float, default=10.0, help="an instance's step (default 10)")
    parser.add_argument("--delivery-ms", type=float, default=1.0, help="from the router to a home (default 1)")
    parser.add_argument("--cost-model", default="cpu")
    args = parser.parse_args(arguments)
    try:
        settings = BurstSettings(
            args.instances, pool_tokens=args.pool_tokens, report_every_ms=args.report_every_ms, delivery_ms=args.delivery_ms
        )
        policy = make_policy(
            "dual-balance",
            num_instances=args.instances,
            page_size=settings.page_size,
            cost_model=load_cost_model(args.cost_model, args.instances),
            degree=None,
            max_degree=args.instances,
            max_guest_fraction=1.0,
        )
        gap = args.within_ms / max(1, args.requests - 1)
        arrivals = [(gap * index, args.prompt, args.max_new) for index in range(args.requests)]
        placements = place_burst(arrivals, policy, settings, args.instances)
    except (OSError, ValueError) as error:
        print(f"benchmark.simulate.burst: {error}", file=sys.stderr)
        return 2
    homes = [placement.home for placement in placements]
    print(json.dumps({"homes": homes, "degrees": [placement.degree for placement in placements]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
