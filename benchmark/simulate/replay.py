"""Compares a served run with the policy on its own: same arrivals, same placements?

The router's view of a load is what it has placed and not yet seen finish; given arrivals, finishes and observed placements, the same
policy code must choose the same placement for every request.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmark.simulate.cluster import Cluster, SimulatedRequest
from sglang_dcp.policy.types import Placement, PlacementPolicy, PlacementRequest


@dataclass(frozen=True)
class ObservedRequest:
    """One request of a served run, in the router's order. `finish` is when the router saw it leave, None when it never did."""

    arrival: float
    prompt_tokens: int
    max_new_tokens: int
    placement: Placement
    finish: float | None = None
    expected_new_tokens: int | None = None
    degree: int | None = None
    home: int | None = None


@dataclass(frozen=True)
class ReplayResult:
    """`differences` holds (index, observed, chosen) of every request that the policy places otherwise."""

    num_requests: int
    differences: tuple[tuple[int, Placement, Placement], ...]

    @property
    def share_equal(self) -> float:
        return 1 - len(self.differences) / self.num_requests if self.num_requests else 1.0


def replay(
    observed: Sequence[ObservedRequest],
    policy: PlacementPolicy,
    *,
    num_instances: int,
    instances_per_node: int,
    pool_tokens: int,
    page_size: int,
) -> ReplayResult:
    """Places every request on the load that the observed placements before it left. Growth while decoding is not replayed.

    After a difference the observed placement is booked, so that one difference does not cause the next.
    Raises ValueError when arrivals are not in order.
    """
    if any(later.arrival < earlier.arrival for earlier, later in zip(observed, observed[1:], strict=False)):
        raise ValueError("observed requests must be in order of arrival")
    cluster = Cluster(num_instances, instances_per_node, pool_tokens, page_size)
    present: list[tuple[float, SimulatedRequest]] = []
    differences = []
    for index, item in enumerate(observed):
        for finish, request in [entry for entry in present if entry[0] <= item.arrival]:
            cluster.withdraw(request)
            present.remove((finish, request))
        expected = item.max_new_tokens if item.expected_new_tokens is None else item.expected_new_tokens
        wanted = PlacementRequest(item.prompt_tokens, expected, item.max_new_tokens, item.degree, item.home)
        chosen = policy.place(wanted, cluster.loads, page_size)
        if chosen != item.placement:
            differences.append((index, item.placement, chosen))
        request = SimulatedRequest(index, item.arrival, item.prompt_tokens, item.max_new_tokens)
        cluster.promise(request, item.placement)
        if item.finish is not None:
            present.append((item.finish, request))
    return ReplayResult(len(observed), tuple(differences))
