"""What others do, as they do it: data-parallel placement, static groups, and the length buckets of the authors' release."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from sglang_dcp.policy.cost_model import CostModel
from sglang_dcp.policy.split import build_placement, check_pins, check_request, free_pages, node_members, num_pages, reach_of, water_fill
from sglang_dcp.policy.split_limits import SplitRule
from sglang_dcp.policy.types import CapacityError, InstanceLoad, Placement, PlacementRequest

# Largest prompt (tokens) of each degree, from the authors' artifact evaluation (32 H200, groups of 8).
LENGTH_BUCKETS: dict[str, tuple[tuple[int, int], ...]] = {
    "deepseek-v3": ((63_488, 1), (210_944, 5), (399_360, 6), (428_032, 7), (1_048_576, 8)),
    "kimi-k2": ((10_240, 1), (22_528, 2), (190_464, 3), (210_944, 4), (354_304, 5), (624_640, 6), (673_792, 7), (1_048_576, 8)),
}


class Local:
    """Data parallelism: a request lives on one instance, the one with the smallest batch or the fewest KV tokens."""

    def __init__(self, rule: str = "least-kv") -> None:
        if rule not in ("least-kv", "least-batch"):
            raise ValueError(f"local policy: rule {rule!r}, expected least-kv or least-batch")
        self.name = f"local-{rule}"
        self._by_batch = rule == "least-batch"

    def place(self, request: PlacementRequest, loads: Sequence[InstanceLoad], page_size: int) -> Placement:
        """See PlacementPolicy. A request beyond one pool is refused: nothing here can hold it."""
        capacities = [load.kv_capacity // page_size * page_size for load in loads]
        check_request(request, max(capacities), "one instance (policy local never splits)")
        check_pins(request, len(loads), 1, page_size)
        if request.home is not None:
            check_request(request, capacities[request.home], f"instance {request.home} (dyncp.home)")
            return Placement(home=request.home, shards=(request.home,), shard_tokens=(request.prompt_tokens,))
        if self._by_batch:
            keys = [(load.home_requests, load.kv_tokens) for load in loads]
        else:
            keys = [(load.kv_tokens, load.home_requests) for load in loads]
        rank = keys.index(min(keys))
        needed = request.prompt_tokens + request.max_new_tokens
        if capacities[rank] < needed:
            rank = min((key, rank) for rank, key in enumerate(keys) if capacities[rank] >= needed)[1]
        return Placement(home=rank, shards=(rank,), shard_tokens=(request.prompt_tokens,))


class FixedDegree:
    """Static context parallelism: consecutive groups of `degree` instances, every request spread evenly over one group.

    Group: the smallest batch; home: the smallest batch in the group. A prompt of fewer pages than `degree` takes one shard per page.
    Groups lie inside nodes, whose last instances are in none where the degree does not divide them; a degree beyond a node is refused,
    or, where shards may cross, cuts all instances into groups.
    """

    name = "fixed"

    def __init__(self, degree: int, rule: SplitRule) -> None:
        if not 1 <= degree <= rule.max_degree:
            raise ValueError(f"--dyncp-degree {degree} is outside 1..{rule.max_degree} (--dyncp-max-degree)")
        self._degree = degree
        self._rule = rule

    def place(self, request: PlacementRequest, loads: Sequence[InstanceLoad], page_size: int) -> Placement:
        """See PlacementPolicy."""
        degree = request.degree or self._degree
        check_pins(request, len(loads), self._rule.max_degree, page_size)
        groups = self._groups(degree, loads, request.home)
        pages = max(reach_of(self._rule, request, loads, group, page_size) for group in groups)
        check_request(request, pages * page_size, f"a group of {degree} (--dyncp-degree, --dyncp-max-guest-fraction)")
        group = min(
            groups, key=lambda group: (sum([loads[rank].home_requests for rank in group]), sum([loads[rank].kv_tokens for rank in group]))
        )
        home = request.home if request.home is not None else _smallest_batch(loads, group)
        return spread_evenly(request, loads, home, group, page_size, self._rule)

    def _groups(self, degree: int, loads: Sequence[InstanceLoad], home: int | None) -> list[list[int]]:
        """Those that the request may lie on: with a pinned home the one that has it, or one around it."""
        nodes: list[list[int]] = [members for members in node_members(loads) if len(members) >= degree]
        if not nodes and self._rule.crosses:
            nodes = [list(range(len(loads)))]
        if not nodes:
            raise CapacityError(f"a degree of {degree} exceeds the instances of a node (--dyncp-degree, dyncp.degree, --dyncp-node-size)")
        groups = [node[start : start + degree] for node in nodes for start in range(0, len(node) - degree + 1, degree)]
        if home is None:
            return groups
        around = [_group_around(home, degree, node) for node in nodes if home in node]
        if not around:
            raise CapacityError(f"the node of dyncp.home = {home} has fewer than {degree} instances (--dyncp-degree, dyncp.degree)")
        return [group for group in groups if home in group] or around


def _smallest_batch(loads: Sequence[InstanceLoad], ranks: Sequence[int]) -> int:
    return min(ranks, key=lambda rank: (loads[rank].home_requests, loads[rank].kv_tokens, rank))


def _group_around(home: int, degree: int, node: Sequence[int]) -> list[int]:
    start = min(node.index(home), len(node) - degree)
    return list(node[start : start + degree])


def spread_evenly(
    request: PlacementRequest, loads: Sequence[InstanceLoad], home: int, group: Sequence[int], page_size: int, rule: SplitRule
) -> Placement:
    """Equal pages on every member of `group`, bounded by the pools and what guests may take of them; the home is the tail, with a page of
    headroom. CapacityError where they cannot hold the prompt so."""
    pages = num_pages(request.prompt_tokens, page_size)
    pools = {rank: loads[rank].kv_capacity // page_size for rank in group}
    rooms = {rank: pool - 1 if rank == home else rule.guest_pages(pool) for rank, pool in pools.items()}
    ranks = [home, *(rank for rank in group if rank != home)][:pages]
    shares = water_fill([0.0] * len(ranks), [rooms[rank] for rank in ranks], pages, 1.0)
    return build_placement(home, home, dict(zip(ranks, shares, strict=True)), request.prompt_tokens, page_size)


class LengthBuckets:
    """The published release: degree by prompt length, shards inside one node, frozen at admission; home = smallest batch among them.

    Node: the smallest batch. Ranks: by batch, then free pages; pages: water-filled onto the least loaded; when they do not fit,
    the degree rises by one.
    """

    name = "length-buckets"

    def __init__(self, buckets: Sequence[tuple[int, int]], rule: SplitRule) -> None:
        if list(buckets) != sorted(buckets) or not buckets:
            raise ValueError(f"length buckets must rise in length and degree, got {list(buckets)}")
        self._limits = [limit for limit, _ in buckets]
        self._degrees = [degree for _, degree in buckets]
        self._rule = rule
        self._nodes: list[list[int]] = []

    @classmethod
    def for_cost_model(cls, cost_model: CostModel, rule: SplitRule) -> LengthBuckets:
        """The authors' buckets of the model, or for another model those of DeepSeek-V3 scaled by attention cost per token."""
        model = cost_model.name.split(".")[0]
        if model in LENGTH_BUCKETS:
            return cls(LENGTH_BUCKETS[model], rule)
        scale = max(1e-6, (cost_model.exchange_fixed_us / 15.8) * (0.000444 / max(cost_model.attention_us_per_token, 1e-12)))
        return cls([(max(1, int(limit * scale)), degree) for limit, degree in LENGTH_BUCKETS["deepseek-v3"]], rule)

    def place(self, request: PlacementRequest, loads: Sequence[InstanceLoad], page_size: int) -> Placement:
        """See PlacementPolicy. Raises CapacityError for a prompt that no node can hold."""
        if sum(map(len, self._nodes)) != len(loads):
            self._nodes = node_members(loads)
        check_pins(request, len(loads), min(self._rule.max_degree, len(loads)), page_size)
        nodes = self._nodes if request.home is None else [members for members in self._nodes if request.home in members]
        largest = reach_of(self._rule, request, loads, nodes[0], page_size)
        if request.prompt_tokens + request.max_new_tokens > largest * page_size:
            largest = max(reach_of(self._rule, request, loads, node, page_size) for node in nodes)
        check_request(
            request,
            largest * page_size,
            "one node (policy length-buckets stays inside a node; --dyncp-max-degree, --dyncp-max-guest-fraction)",
        )
        pages = num_pages(request.prompt_tokens, page_size)
        position = min(bisect_left(self._limits, request.prompt_tokens), len(self._degrees) - 1)
        start = request.degree or max(1, min(self._degrees[position], self._rule.max_degree, pages))
        node = min(nodes, key=lambda members: (sum([loads[rank].home_requests for rank in members]), members[0]))
        if request.degree is None and not self._rule.guest_pages(loads[node[0]].kv_capacity // page_size):
            start = 1
        if start > len(node):
            if request.degree is not None:
                raise CapacityError(f"dyncp.degree = {request.degree} exceeds the {len(node)} instances of a node (policy length-buckets)")
            start = len(node)
        ordered = sorted(node, key=lambda rank: (rank != request.home, loads[rank].home_requests, loads[rank].kv_tokens, rank))
        for degree in range(start, start + 1 if request.degree else min(len(node), self._rule.max_degree, pages) + 1):
            placement = self._try(request, loads, ordered, degree, pages, page_size)
            if placement is not None:
                return placement
        group = ordered[:start]
        if reach_of(self._rule, request, loads, group, page_size) <= pages and request.degree is None:
            group = ordered[: self._rule.max_degree]
        return spread_evenly(request, loads, ordered[0], group, page_size, self._rule)

    def _try(
        self, request: PlacementRequest, loads: Sequence[InstanceLoad], ordered: Sequence[int], degree: int, pages: int, page_size: int
    ) -> Placement | None:
        """The placement at this degree if it fits now: the poorest members are swapped for richer ones while the pages do not fit."""
        chosen, spare = list(ordered[:degree]), list(ordered[degree:])

        def room(rank: int) -> int:
            return free_pages(loads[rank], page_size)

        while spare and (sum(map(room, chosen)) <= pages or min(map(room, chosen)) < 2):
            swappable = [rank for rank in chosen if rank != request.home]
            if not swappable:
                return None
            poorest, richest = min(swappable, key=room), max(spare, key=room)
            if room(richest) <= room(poorest):
                break
            chosen[chosen.index(poorest)] = richest
            spare.remove(richest)
        home = request.home if request.home is not None else _smallest_batch(loads, chosen)
        ranks = [home, *(rank for rank in chosen if rank != home)]
        rooms = [room(rank) - 1 if rank == home else min(room(rank), self._guest_room(loads[rank], page_size)) for rank in ranks]
        if min(rooms) < 1 or sum(rooms) < pages:
            return None
        shares = water_fill([float(loads[rank].kv_tokens) for rank in ranks], rooms, pages, float(page_size))
        return build_placement(home, home, dict(zip(ranks, shares, strict=True)), request.prompt_tokens, page_size)

    def _guest_room(self, load: InstanceLoad, page_size: int) -> int:
        return self._rule.guest_pages(load.kv_capacity // page_size) - num_pages(load.guest_tokens, page_size)
