"""What instances would hold while the requests of a trace come and go, placed by the served policy.

No queue and no growth: every request is booked with prompt and output from its arrival on, whether there is room or not, and leaves after
its output tokens at the step time predicted when it came. That answers how much room a trace needs; what waiting does to latency is
the simulator's question (`python -m benchmark.simulate`).
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from sglang_dcp.policy.cost_model import CostModel, InstanceWork
from sglang_dcp.policy.expected_output import expected_new_tokens
from sglang_dcp.policy.types import CapacityError, InstanceLoad, Placement, PlacementPolicy, PlacementRequest
from sglang_dcp.traces.records import Trace, TraceRequest


@dataclass
class Occupancy:
    """`num_refused`: beyond what empty instances hold under this policy. `num_without_room`: found less free than they need at arrival.

    `degrees` counts the placed ones. `steps_ms`: the predicted step after each of them, in order of arrival.
    """

    num_refused: int = 0
    num_without_room: int = 0
    degrees: Counter[int] = field(default_factory=Counter)
    peak_tokens: int = 0
    peak_requests: int = 0
    steps_ms: list[float] = field(default_factory=list)


@dataclass
class _Books:
    """Loads of the instances, and the routed rows beside them: the policy reads the first, a step's price needs both."""

    loads: list[InstanceLoad]
    cost: CostModel
    routed: list[list[int]] = field(init=False)
    num_requests: int = 0

    def __post_init__(self) -> None:
        # Per instance: rows out, rows in, and those of them that cross nodes.
        self.routed = [[0, 0, 0, 0] for _ in self.loads]

    def has_room(self, held: Sequence[tuple[int, int]]) -> bool:
        return all(tokens <= self.loads[rank].free_tokens for rank, tokens in held)

    def book(self, placement: Placement, held: Sequence[tuple[int, int]], sign: int) -> None:
        """Adds (1) or takes away (-1) a request that holds (rank, tokens) and has its rows at `placement`."""
        self.num_requests += sign
        self.loads[placement.home].home_requests += sign
        for rank, tokens in held:
            load = self.loads[rank]
            load.kv_tokens += sign * tokens
            load.attention_rows += sign
            if rank == placement.home:
                continue
            load.guest_tokens += sign * tokens
            is_remote = load.node != self.loads[placement.home].node
            self.routed[placement.home][0] += sign
            self.routed[rank][1] += sign
            self.routed[placement.home][2] += sign * is_remote
            self.routed[rank][3] += sign * is_remote

    def step_ms(self) -> float:
        pairs = zip(self.loads, self.routed, strict=True)
        return self.cost.step_us([InstanceWork(x.kv_tokens, x.attention_rows, x.home_requests, *rows) for x, rows in pairs]) / 1000


def occupy(
    requests: Iterable[TraceRequest],
    policy: PlacementPolicy,
    cost: CostModel,
    loads: list[InstanceLoad],
    *,
    page_size: int,
    max_new_tokens: int,
    max_degree: int,
) -> Occupancy:
    """Places every request in order of arrival; `loads` are those of the start and end as those of the end.

    `max_new_tokens` is what a client asks for; the policy knows it, and never the true output.
    """
    books, result = _Books(loads, cost), Occupancy()
    leaving: list[tuple[float, int, Placement, list[tuple[int, int]]]] = []
    tokens_held = sum(load.kv_tokens for load in loads)
    for index, item in enumerate(requests):
        while leaving and leaving[0][0] <= item.arrival_s:
            _, _, placement, held = heapq.heappop(leaving)
            books.book(placement, held, -1)
            tokens_held -= sum(tokens for _, tokens in held)
        most = max(max_new_tokens, item.output_tokens)
        try:
            placement = policy.place(PlacementRequest(item.prompt_tokens, expected_new_tokens(most, max_degree), most), loads, page_size)
        except CapacityError:
            result.num_refused += 1
            continue
        held = _held(placement, item.output_tokens)
        result.num_without_room += not books.has_room(held)
        books.book(placement, held, 1)
        tokens_held += sum(tokens for _, tokens in held)
        step_ms = books.step_ms()
        heapq.heappush(leaving, (item.arrival_s + item.output_tokens * step_ms / 1000, index, placement, held))
        result.degrees[placement.degree] += 1
        result.steps_ms.append(step_ms)
        result.peak_tokens = max(result.peak_tokens, tokens_held)
        result.peak_requests = max(result.peak_requests, books.num_requests)
    return result


def _held(placement: Placement, output_tokens: int) -> list[tuple[int, int]]:
    """(rank, tokens) at the end of the request; the tail takes the output."""
    held = dict(zip(placement.shards, placement.shard_tokens, strict=True))
    held[placement.tail] += output_tokens
    return list(held.items())


def arrivals(trace: Trace, rate: float | None, limit: int) -> list[TraceRequest]:
    """The first `limit` requests; those of a tick stand evenly in it, and the clock is stretched to `rate` requests/s where one is given.

    Raises ValueError for a rate that is not positive, or one for a trace without a clock.
    """
    if rate is not None and not rate > 0:
        raise ValueError(f"--rate {rate} must be positive")
    if rate is not None and not trace.span_s:
        raise ValueError(f"--rate {rate}: all requests of {trace.name} arrive at one time; there is no clock to stretch")
    scale = 1.0 if rate is None else len(trace.requests) / trace.span_s / rate
    spread = []
    for moment, group in groupby(trace.requests, key=lambda item: item.arrival_s):
        items = list(group)
        spread += [item._replace(arrival_s=scale * (moment + trace.tick_s * i / len(items))) for i, item in enumerate(items)]
        if len(spread) >= limit:
            break
    return sorted(spread[:limit])
