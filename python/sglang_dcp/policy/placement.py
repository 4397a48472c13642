"""Dual balance: home, node and shards are chosen together by predicted step time.

Every instance has a *level*, the microseconds that its KV tokens, rows and home requests add to a layer. The step ends with the
highest level, so a candidate costs

    max(highest level now, its own level afterwards) + own_weight * its own level afterwards + what it adds to the exchange

The first term is what everybody waits for now; the second keeps valleys open for those who come next. Degree 1 wins wherever
splitting saves less than the exchange costs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sglang_dcp.policy.baselines import FixedDegree, LengthBuckets, Local
from sglang_dcp.policy.cost_model import CostModel
from sglang_dcp.policy.split import build_placement, check_pins, check_request, free_pages, node_members, num_pages, water_fill
from sglang_dcp.policy.types import CapacityError, InstanceLoad, Placement, PlacementPolicy, PlacementRequest

__all__ = ["POLICY_NAMES", "DualBalance", "FixedDegree", "LengthBuckets", "Local", "make_policy"]

POLICY_NAMES = ("dual-balance", "length-buckets", "fixed", "local")
# A prompt whose attention costs fewer routed rows than this is never split: in the authors' own runs nearly all of the extra
# work of spreading came from short prompts.
MIN_SPLIT_ROWS = 8
# Nodes for which every degree is priced; the others have a higher mean level.
NUM_PRICED_NODES = 2


@dataclass(frozen=True, slots=True)
class _Call:
    """One request with what the policy derives from the loads once."""

    request: PlacementRequest
    loads: Sequence[InstanceLoad]
    levels: list[float]
    page_size: int
    pages: int

    @property
    def total_tokens(self) -> int:
        return self.request.prompt_tokens + min(self.request.expected_new_tokens, self.request.max_new_tokens)


class DualBalance:
    """Ours. `own_weight` mixes the own level with the global maximum; `max_guest_fraction` bounds guest tokens per pool at admission."""

    name = "dual-balance"

    def __init__(self, cost_model: CostModel, max_degree: int, max_guest_fraction: float = 1.0, own_weight: float = 0.25) -> None:
        self._cost = cost_model
        self._max_degree = max_degree
        self._max_guest_fraction = max_guest_fraction
        self._own_weight = own_weight
        self._token_us = cost_model.attention_us_per_token
        self._request_us = cost_model.request_us + cost_model.attention_us_per_row
        self._row_us = cost_model.exchange_us_per_row + cost_model.attention_us_per_row
        self._nodes: list[list[int]] = []

    def place(self, request: PlacementRequest, loads: Sequence[InstanceLoad], page_size: int) -> Placement:
        """See PlacementPolicy. Deterministic; ties go to the lower rank."""
        self._check(request, loads, page_size)
        token_us, request_us = self._token_us, self._request_us
        levels = [token_us * load.kv_tokens + request_us * load.home_requests for load in loads]
        call = _Call(request, loads, levels, page_size, num_pages(request.prompt_tokens, page_size))
        if request.degree is not None:
            return self._place_pinned(call)
        single = self._best_single(call)
        is_small = token_us * request.prompt_tokens < MIN_SPLIT_ROWS * self._row_us
        if single is not None and (is_small or self._max_degree == 1):
            return _single(request, single)
        best_cost, best = float("inf"), None
        if single is not None:
            best_cost = self._price(levels[single] + token_us * call.total_tokens + request_us, max(levels))
        if call.pages > 1 and self._max_degree > 1 and not (is_small and self._fits_one_pool(call)):
            for members in self._candidate_groups(call):
                cost, choice = self._best_split(call, members)
                if choice is not None and cost < best_cost:
                    best_cost, best = cost, choice
        if best is not None:
            return self._split(call, *best, waiting=False)
        return _single(request, single) if single is not None else self._place_waiting(call)

    def _check(self, request: PlacementRequest, loads: Sequence[InstanceLoad], page_size: int) -> None:
        if len(self._nodes) == 0 or sum(map(len, self._nodes)) != len(loads):
            self._nodes = node_members(loads)
        capacities = [load.kv_capacity // page_size * page_size for load in loads]
        check_request(request, sum(capacities), f"all {len(loads)} instances")
        check_pins(request, len(loads), min(self._max_degree, len(loads)), page_size)
        at_most = request.degree or min(self._max_degree, len(loads))
        reach = sum(sorted(capacities, reverse=True)[:at_most]) if at_most < len(loads) else sum(capacities)
        if request.prompt_tokens > reach:
            raise CapacityError(
                f"prompt_tokens = {request.prompt_tokens} exceed {reach}, the KV capacity of {at_most} instances "
                f"(degree at most {at_most}: --dyncp-max-degree or dyncp.degree)"
            )

    def _price(self, own_level: float, highest: float) -> float:
        return max(highest, own_level) + self._own_weight * own_level

    def _fits_one_pool(self, call: _Call) -> bool:
        limit = (call.pages + 1) * call.page_size
        return any(load.kv_capacity >= limit for load in call.loads)

    def _best_single(self, call: _Call) -> int | None:
        """The lowest instance with room for prompt, expected output and a page; else with room for prompt and a page; else None."""
        loads, levels = call.loads, call.levels
        needs = ((num_pages(call.total_tokens, call.page_size) + 1) * call.page_size, (call.pages + 1) * call.page_size)
        if call.request.home is not None:
            home = call.request.home
            return home if loads[home].free_tokens >= needs[1] else None
        for needed in needs:
            lowest = levels.index(min(levels))
            if loads[lowest].free_tokens >= needed:
                return lowest
            fitting = [load.rank for load in loads if load.kv_capacity - load.kv_tokens >= needed]
            if fitting:
                return min(fitting, key=levels.__getitem__)
        return None

    def _candidate_groups(self, call: _Call) -> Iterator[list[int]]:
        """The nodes with the lowest mean level that have room now; all instances only when the prompt fits no node."""
        needed = (call.pages + 1) * call.page_size
        loads, levels = call.loads, call.levels
        if not any(sum(loads[rank].kv_capacity for rank in members) >= needed for members in self._nodes):
            yield list(range(len(loads)))
            return
        nodes = self._nodes
        if call.request.home is not None:
            nodes = [members for members in nodes if call.request.home in members]
        priced = 0
        for members in sorted(nodes, key=lambda members: sum([levels[rank] for rank in members]) / len(members)):
            if sum([loads[rank].free_tokens for rank in members]) >= needed:
                yield members
                priced += 1
                if priced == NUM_PRICED_NODES:
                    return

    def _rooms(self, call: _Call, rank: int, waiting: bool) -> tuple[int, int]:
        """Pages that instance `rank` could take as home (one page of headroom left) and as guest."""
        load, page_size = call.loads[rank], call.page_size
        pages = load.kv_capacity // page_size if waiting else free_pages(load, page_size)
        guests = 0 if waiting else load.guest_tokens
        return pages - 1, min(pages, int(self._max_guest_fraction * load.kv_capacity - guests) // page_size)

    def _best_split(self, call: _Call, members: Sequence[int], waiting: bool = False) -> tuple[float, tuple[int, list[int]] | None]:
        """Cheapest (home, shards without the home) among all degrees over the lowest `members`; None when none has room."""
        levels, loads = call.levels, call.loads
        rooms = {rank: self._rooms(call, rank, waiting) for rank in members}
        pinned = call.request.home
        ordered = sorted((rank for rank in members if rank != pinned and rooms[rank][1] >= 1), key=levels.__getitem__)
        if pinned is not None:
            ordered = [pinned, *ordered] if rooms[pinned][0] >= 1 else []
        highest, best_cost, best = max(levels), float("inf"), None
        is_active = any(load.guest_tokens for load in loads)
        column, guest_room, home = self._token_us * call.total_tokens + self._request_us, 0, -1
        for degree, rank in enumerate(ordered[: min(self._max_degree, call.pages)], start=1):
            column += levels[rank]
            guest_room += rooms[rank][1]
            if pinned is not None:
                home = pinned
            elif rooms[rank][0] >= 1 and (home < 0 or loads[rank].home_requests < loads[home].home_requests):
                home = rank
            if degree == 1 or home < 0 or guest_room - rooms[home][1] + rooms[home][0] < call.pages:
                continue
            own = (column + 2 * (degree - 1) * self._row_us) / degree
            cost = self._price(max(own, levels[rank]), highest) + self._exchange_price(degree, is_active)
            if cost < best_cost:
                best_cost, best = cost, (home, [other for other in ordered[:degree] if other != home])
        return best_cost, best

    def _exchange_price(self, degree: int, is_active: bool) -> float:
        return (degree - 1) * self._row_us + (0.0 if is_active else self._cost.exchange_fixed_us)

    def _split(self, call: _Call, home: int, guests: Sequence[int], *, waiting: bool) -> Placement:
        ranks = [home, *guests]
        heights = [call.levels[rank] for rank in ranks]
        heights[0] += self._request_us + len(guests) * self._row_us + self._token_us * (call.total_tokens - call.request.prompt_tokens)
        rooms = [self._rooms(call, home, waiting)[0], *(self._rooms(call, rank, waiting)[1] for rank in guests)]
        shares = water_fill(heights, rooms, call.pages, self._token_us * call.page_size)
        return build_placement(home, home, dict(zip(ranks, shares, strict=True)), call.request.prompt_tokens, call.page_size)

    def _place_waiting(self, call: _Call) -> Placement:
        """Nothing has room now: the most free pool for a request that one pool can hold, else the most free group, filled evenly."""
        loads, request = call.loads, call.request
        small_enough = [load for load in loads if load.kv_capacity >= (call.pages + 1) * call.page_size]
        splits = self._token_us * request.prompt_tokens >= MIN_SPLIT_ROWS * self._row_us and call.pages > 1 and self._max_degree > 1
        if request.home is not None:
            small_enough = [load for load in small_enough if load.rank == request.home]
        if small_enough and not splits:
            return _single(request, min(small_enough, key=lambda load: (load.kv_tokens - load.kv_capacity, load.rank)).rank)
        needed = (call.pages + 1) * call.page_size
        groups = [members for members in self._nodes if sum(loads[rank].kv_capacity for rank in members) >= needed]
        groups = groups or [list(range(len(loads)))]
        if request.home is not None:
            groups = [members for members in groups if request.home in members] or [list(range(len(loads)))]
        members = max(groups, key=lambda members: sum(loads[rank].kv_capacity - loads[rank].kv_tokens for rank in members))
        return self._spread(call, members, min(self._max_degree, call.pages))

    def _spread(self, call: _Call, members: Sequence[int], degree: int) -> Placement:
        """Exactly `degree` shards (fewer only if `members` are fewer) over the most free pools, by room now or by capacity."""
        loads = call.loads
        ordered = sorted(members, key=lambda rank: (loads[rank].kv_tokens - loads[rank].kv_capacity, call.levels[rank], rank))
        home = call.request.home
        if home is None:
            home = min(ordered[:degree], key=lambda rank: (loads[rank].home_requests, call.levels[rank], rank))
        guests = [rank for rank in ordered if rank != home][: degree - 1]
        for waiting in (False, True):
            rooms = [self._rooms(call, home, waiting)[0], *(self._rooms(call, rank, waiting)[1] for rank in guests)]
            if min(rooms) >= 1 and sum(rooms) >= call.pages:
                return self._split(call, home, guests, waiting=waiting)
        raise CapacityError(
            f"prompt_tokens = {call.request.prompt_tokens} ({call.pages} pages of {call.page_size}) do not fit shards {[home, *guests]} "
            f"with room for {rooms} pages (dyncp pins, --dyncp-max-degree, --dyncp-max-guest-fraction {self._max_guest_fraction})"
        )

    def _place_pinned(self, call: _Call) -> Placement:
        degree, home = call.request.degree or 1, call.request.home
        if degree == 1:
            single = self._best_single(call)
            if single is None:
                fitting = [load.rank for load in call.loads if load.kv_capacity >= (call.pages + 1) * call.page_size]
                fitting = [rank for rank in fitting if home is None or rank == home]
                if not fitting:
                    return self._spread(call, range(len(call.loads)), 1)
                single = min(fitting, key=lambda rank: (call.loads[rank].kv_tokens - call.loads[rank].kv_capacity, rank))
            return _single(call.request, single)
        nodes = [members for members in self._nodes if len(members) >= degree and (home is None or home in members)]
        rooms = [(sum(call.loads[rank].free_tokens for rank in members), members) for members in nodes]
        fitting_nodes = [members for room, members in rooms if room >= (call.pages + 1) * call.page_size]
        if fitting_nodes:
            return self._spread(call, min(fitting_nodes, key=lambda members: sum(call.levels[rank] for rank in members)), degree)
        return self._spread(call, nodes[0] if nodes and self._node_can_hold(call, nodes[0], degree) else range(len(call.loads)), degree)

    def _node_can_hold(self, call: _Call, members: Sequence[int], degree: int) -> bool:
        capacities = sorted((call.loads[rank].kv_capacity for rank in members), reverse=True)
        return sum(capacities[:degree]) >= (call.pages + 1) * call.page_size


def _single(request: PlacementRequest, rank: int) -> Placement:
    return Placement(home=rank, shards=(rank,), shard_tokens=(request.prompt_tokens,))


def make_policy(
    name: str,
    *,
    num_instances: int,
    page_size: int,
    cost_model: CostModel,
    degree: int | None,
    max_degree: int,
    max_guest_fraction: float,
) -> PlacementPolicy:
    """The policy of `--dyncp-policy`. Raises ValueError naming the flag for a value that cannot work.

    `local-least-batch` and `local-least-kv` name the two variants of `local` (which alone means least KV).
    """
    if page_size < 2:
        raise ValueError(f"--page-size {page_size}: placement needs pages of at least 2 tokens")
    if not 1 <= max_degree <= num_instances:
        raise ValueError(f"--dyncp-max-degree {max_degree} is outside 1..{num_instances}")
    if not 0.0 <= max_guest_fraction <= 1.0:
        raise ValueError(f"--dyncp-max-guest-fraction {max_guest_fraction} is outside 0..1")
    if (degree is not None) != (name == "fixed"):
        raise ValueError(f"--dyncp-degree goes with --dyncp-policy fixed and only with it, got degree {degree} and policy {name}")
    if name == "dual-balance":
        return DualBalance(cost_model, max_degree, max_guest_fraction)
    if name == "length-buckets":
        return LengthBuckets.for_cost_model(cost_model, max_degree)
    if name == "fixed" and degree is not None:
        if not 1 <= degree <= max_degree:
            raise ValueError(f"--dyncp-degree {degree} is outside 1..{max_degree} (--dyncp-max-degree)")
        return FixedDegree(degree)
    if name in ("local", "local-least-kv"):
        return Local("least-kv")
    if name == "local-least-batch":
        return Local("least-batch")
    raise ValueError(f"--dyncp-policy {name!r}: expected one of {', '.join(POLICY_NAMES)}")
