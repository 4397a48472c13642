"""What a router knows of the cluster: the instances' own reports, and the placements that those do not hold yet.

An instance reports what its requests hold or wait for, on every instance. So a token is in one report only, and on its way from a
waiting prompt to pages of several pools it is neither counted twice nor missed. A placement counts from the moment it is made until a
report of its home says that it has arrived, by its number: no clock is read. The router and the simulator (benchmark/simulate/burst.py)
run this code.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from sglang_dcp.policy.types import InstanceLoad, Placement


@dataclass(frozen=True, slots=True)
class HomeReport:
    """What an instance tells about the requests that it is home to.

    taken_in: number of the newest placement that has arrived (numbers count up from 1 per home; they arrive in order).
    num_requests: in whatever state. tokens: by instance, what these requests hold there or wait for.
    """

    taken_in: int
    num_requests: int
    tokens: dict[int, int]


@dataclass(slots=True)
class _Home:
    """under_way: placements that no report holds yet, in order; the newest is number `num_placed`."""

    report: HomeReport = field(default_factory=lambda: HomeReport(0, 0, {}))
    num_placed: int = 0
    under_way: deque[Placement] = field(default_factory=deque)


class ClusterView:
    """Loads of all instances. `nodes[r]` is the node of instance r."""

    def __init__(self, nodes: Sequence[int]) -> None:
        self._nodes = list(nodes)
        self._homes = [_Home() for _ in nodes]
        self._capacity = [0] * len(nodes)
        self._tokens = [0] * len(nodes)
        self._guest_tokens = [0] * len(nodes)

    @property
    def smallest_capacity(self) -> int:
        """Tokens of the smallest pool."""
        return min(self._capacity)

    def num_placed(self, home: int) -> int:
        """Placements so far with this home."""
        return self._homes[home].num_placed

    def taken_in(self) -> list[int]:
        """Of every home, the number of the newest placement that has arrived there."""
        return [view.report.taken_in for view in self._homes]

    def take_report(self, home: int, capacity: int, report: HomeReport) -> None:
        """Replaces what `home` told before; the placements that it has taken in are in the report from now on.

        Raises ValueError for a number that was never given to it.
        """
        view = self._homes[home]
        if report.taken_in > view.num_placed:
            raise ValueError(f"instance {home} reports placement {report.taken_in}, it was sent {view.num_placed}")
        self._capacity[home] = capacity
        while view.num_placed - len(view.under_way) < report.taken_in:
            self._count(home, _tokens_of(view.under_way.popleft()), -1)
        if report.tokens != view.report.tokens:
            self._count(home, view.report.tokens.items(), -1)
            self._count(home, report.tokens.items(), 1)
        view.report = report

    def place(self, placement: Placement) -> int:
        """Counts a placement from now on. Returns its number, which must reach the home with the request."""
        view = self._homes[placement.home]
        view.under_way.append(placement)
        view.num_placed += 1
        self._count(placement.home, _tokens_of(placement), 1)
        return view.num_placed

    def loads(self) -> list[InstanceLoad]:
        """One per instance, in rank order."""
        loads = []
        for rank, view in enumerate(self._homes):
            requests = view.report.num_requests + len(view.under_way)
            loads.append(
                InstanceLoad(
                    rank=rank,
                    node=self._nodes[rank],
                    kv_tokens=self._tokens[rank],
                    kv_capacity=self._capacity[rank],
                    guest_tokens=self._guest_tokens[rank],
                    home_requests=requests,
                    attention_rows=requests,
                )
            )
        return loads

    def _count(self, home: int, tokens: Iterable[tuple[int, int]], sign: int) -> None:
        for rank, count in tokens:
            self._tokens[rank] += sign * count
            if rank != home:
                self._guest_tokens[rank] += sign * count


def _tokens_of(placement: Placement) -> Iterable[tuple[int, int]]:
    return zip(placement.shards, placement.shard_tokens, strict=True)
