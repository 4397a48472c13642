"""Dual balance: home, node and shards are chosen together by predicted step time (pricing.py), under the room of the pools.

Degree 1 wins wherever splitting saves less than the exchange costs. The tail is the home, so that in steady state only queries and
partial results travel. Beyond `WINDOW` instances a rotating window of whole nodes is priced instead of all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

from sglang_dcp.policy.cost_model import CostModel
from sglang_dcp.policy.placement_call import Call, as_range, of
from sglang_dcp.policy.pricing import Levels, Split, cheapest_split
from sglang_dcp.policy.split import check_pins, check_request, node_members, num_pages, reach_of, water_fill
from sglang_dcp.policy.split_limits import SplitRule
from sglang_dcp.policy.types import CapacityError, InstanceLoad, Placement, PlacementRequest

# A prompt whose attention costs fewer routed rows than this is never split while one pool can hold it: in the authors' own runs
# nearly all of the extra work of spreading came from short prompts.
MIN_SPLIT_ROWS = 8
# Nodes for which every degree is priced; the others have a higher mean level.
NUM_PRICED_NODES = 2
# A prompt of at most one part in this many of a pool waits for one pool; a larger one is spread, which finds room sooner.
WAITING_POOL_SHARE = 10
# Instances that one placement looks at; more are looked at in turn.
WINDOW = 128


class DualBalance:
    """Ours. Shards of a request lie in one node; where the rule lets them cross, a request that no node could hold is spread over all."""

    name = "dual-balance"

    def __init__(self, cost_model: CostModel, rule: SplitRule) -> None:
        self._cost = cost_model
        self._rule = rule
        row_us = cost_model.exchange_us_per_row + cost_model.attention_us_per_row + cost_model.sharded_row_us
        self._small_tokens = MIN_SPLIT_ROWS * row_us / max(cost_model.attention_us_per_token, 1e-12)
        self._nodes: list[Sequence[int]] = []
        self._group_size = 0
        self._turn = 0

    def place(self, request: PlacementRequest, loads: Sequence[InstanceLoad], page_size: int) -> Placement:
        """See PlacementPolicy. Deterministic for equal inputs and an equal number of earlier calls; ties go to the lower rank."""
        if len(self._nodes) == 0 or self._nodes[-1][-1] != len(loads) - 1:
            self._nodes = [as_range(members) for members in node_members(loads)]
            self._group_size = len(loads) if self._rule.crosses else max(map(len, self._nodes))
        check_pins(request, len(loads), min(self._rule.max_degree, self._group_size), page_size)
        if len(loads) > WINDOW and request.home is None and request.degree is None:
            placement = self._place_now(self._window_call(request, loads, page_size))
            if placement is not None and request.prompt_tokens + request.max_new_tokens <= loads[placement.home].kv_capacity:
                return placement
        self._check_capacity(request, loads, page_size)
        call = self._call(request, loads, self._nodes, page_size)
        if request.degree is not None:
            return self._place_pinned(call, request.degree)
        return self._place_now(call) or self._place_waiting(call)

    def _call(self, request: PlacementRequest, loads: Sequence[InstanceLoad], nodes: Sequence[Sequence[int]], page_size: int) -> Call:
        return Call(
            request=request,
            loads=loads,
            nodes=nodes,
            levels=Levels.of(loads, self._cost),
            page_size=page_size,
            pages=num_pages(request.prompt_tokens, page_size),
            total_tokens=request.prompt_tokens + min(request.expected_new_tokens, request.max_new_tokens),
            home=request.home,
            is_small=request.prompt_tokens < self._small_tokens,
            rule=self._rule,
        )

    def _window_call(self, request: PlacementRequest, loads: Sequence[InstanceLoad], page_size: int) -> Call:
        window: list[InstanceLoad] = []
        nodes: list[Sequence[int]] = []
        while len(window) < WINDOW and len(nodes) < len(self._nodes):
            members = self._nodes[self._turn % len(self._nodes)]
            self._turn += 1
            nodes.append(range(len(window), len(window) + len(members)))
            window += [loads[rank] for rank in members]
        return self._call(request, window, nodes, page_size)

    def _groups(self, request: PlacementRequest, loads: Sequence[InstanceLoad]) -> Sequence[Sequence[int]]:
        """Where all shards of the request may lie."""
        if self._rule.crosses:
            return [range(len(loads))]
        return self._nodes if request.home is None else [members for members in self._nodes if request.home in members]

    def _check_capacity(self, request: PlacementRequest, loads: Sequence[InstanceLoad], page_size: int) -> None:
        first_pool = loads[0].kv_capacity // page_size * page_size
        if 1 <= request.prompt_tokens <= first_pool - request.max_new_tokens and request.max_new_tokens >= 0:
            return  # What fits one pool fits them all.
        most, groups = min(self._rule.max_degree, self._group_size), self._groups(request, loads)
        flags = f"--dyncp-max-degree {self._rule.max_degree}, --dyncp-max-guest-fraction {self._rule.guest_fraction}"
        where = f"{most} of {len(loads)} instances ({flags})"
        if self._group_size < len(loads):
            where = f"{most} of the {self._group_size} instances of a node ({flags}, --dyncp-node-size, --nnodes)"
        check_request(request, max(reach_of(self._rule, request, loads, group, page_size, most) for group in groups) * page_size, where)
        reach = max(reach_of(self._rule, request, loads, group, page_size, request.degree or most) for group in groups) * page_size
        if request.prompt_tokens > reach:
            raise CapacityError(
                f"prompt_tokens = {request.prompt_tokens} exceed {reach}, the KV capacity of {request.degree} instances "
                f"(dyncp.degree, {flags})"
            )

    # What has room now

    def _place_now(self, call: Call) -> Placement | None:
        single: int | None = None
        if call.is_small or self._rule.max_degree == 1 or call.pages == 1:
            single = self._best_single(call)
            if single is not None or self._rule.max_degree == 1 or call.pages == 1 or call.fits_one_pool():
                return None if single is None else call.whole(single)
        best: Split | None = None
        for members in self._candidate_nodes(call):
            split = self._best_split(call, members, inf if best is None else best.price)
            if split is not None:
                best = split
        levels = call.levels
        added, lone = levels.request_us(call.total_tokens), self._cost.lone_row_us(call.total_tokens)
        # Where even the emptiest instance is dearer than the split, the best one need not be looked for.
        if best is None or levels.least_price_whole(added, lone) <= best.price:
            single = self._best_single(call)
            if single is not None and (
                best is None or levels.price(max(levels.attention[single] + added, lone), levels.batches[single] + 1) <= best.price
            ):
                return call.whole(single)
        return None if best is None else self._split(call, best.home, best.guests, waiting=False)

    def _best_single(self, call: Call) -> int | None:
        """Where the request is cheapest whole, with room for the expected output too if any has it, and one page of headroom."""
        added, free = call.levels.request_us(call.total_tokens), call.levels.free
        candidates: Sequence[int] = range(len(free)) if call.home is None else (call.home,)
        for tokens in (call.total_tokens, call.request.prompt_tokens):
            needed = (num_pages(tokens, call.page_size) + 1) * call.page_size
            fitting = candidates if call.home is None and min(free) >= needed else [i for i in candidates if free[i] >= needed]
            if fitting:
                return call.levels.lowest_smoothly(fitting, added) if call.is_small else call.levels.lowest(fitting, added)
        return None

    def _candidate_nodes(self, call: Call) -> list[Sequence[int]]:
        """The nodes with the lowest mean level that have room now; all instances, where shards may cross, when the prompt fits no node."""
        needed = (call.pages + 1) * call.page_size
        attention, free = call.levels.attention, call.levels.free
        nodes = call.nodes if call.home is None else [members for members in call.nodes if call.home in members]
        priced = [(sum(of(attention, members)) / len(members), order, members) for order, members in enumerate(nodes)]
        priced.sort()
        able: list[Sequence[int]] = []
        for _, _, members in priced:
            room = of(free, members)
            if min(room) < 0:
                room = [tokens for tokens in room if tokens > 0]
            if sum(room) >= needed:
                able.append(members)
                if len(able) == NUM_PRICED_NODES:
                    break
        if not able and self._rule.crosses and not any(call.fits(members) for members in nodes):
            return [range(len(call.loads))]
        return able

    def _best_split(self, call: Call, members: Sequence[int], cheaper_than: float) -> Split | None:
        loads, page_size, home, free = call.loads, call.page_size, call.home, call.levels.free
        able = members
        if self._rule.guest_fraction < 1.0:
            able = [i for i in members if i != home and call.rooms(i, waiting=False)[1] >= 1]
        elif home is not None or min(of(free, members)) < page_size:
            able = [i for i in members if free[i] >= page_size and i != home]
        ordered = sorted(able, key=call.levels.attention.__getitem__)
        if home is not None:
            has_room = home in members and free[home] >= 2 * page_size
            ordered = [home, *ordered] if has_room else []
        del ordered[min(self._rule.max_degree, call.pages) :]
        guest_rooms = None
        if self._rule.guest_fraction < 1.0:
            guest_rooms = [call.rooms(i, waiting=False)[1] for i in ordered]
        return cheapest_split(
            call.levels,
            ordered,
            guest_rooms,
            page_size=page_size,
            pages=call.pages,
            total_tokens=call.total_tokens,
            pinned_home=home,
            is_remote=bool(ordered) and loads[ordered[0]].node != loads[ordered[-1]].node,
            cheaper_than=cheaper_than,
        )

    def _split(self, call: Call, home: int, guests: Sequence[int], *, waiting: bool) -> Placement:
        positions = [home, *guests]
        cost, attention, free, page_size = self._cost, call.levels.attention, call.levels.free, call.page_size
        heights = [attention[i] for i in positions]
        growth = call.total_tokens - call.request.prompt_tokens
        heights[0] += call.levels.request_us(growth) + len(guests) * cost.exchange_us_per_row
        if waiting or self._rule.guest_fraction < 1.0:
            rooms = [call.rooms(home, waiting=waiting)[0], *[call.rooms(i, waiting=waiting)[1] for i in guests]]
        else:
            rooms = [free[i] // page_size for i in positions]
            rooms[0] -= 1
        shares = water_fill(heights, rooms, call.pages, cost.attention_us_per_token * page_size)
        loads, home_rank = call.loads, call.loads[home].rank
        others = sorted([(loads[i].rank, share * page_size) for i, share in zip(guests, shares[1:], strict=True)])
        tokens = [share for _, share in others]
        tokens.append(call.request.prompt_tokens - sum(tokens))
        return Placement(home_rank, (*[rank for rank, _ in others], home_rank), tuple(tokens))

    # What has to wait, and pins

    def _place_waiting(self, call: Call) -> Placement:
        """Nothing has room now: the most free pool for a request that one pool should hold, else the most free group, filled evenly."""
        loads, needed = call.loads, (call.pages + 1) * call.page_size
        is_modest = call.is_small or call.request.prompt_tokens * WAITING_POOL_SHARE <= max(load.kv_capacity for load in loads)
        if call.fits_one_pool() and (is_modest or call.pages == 1 or self._rule.max_degree == 1):
            fitting = [i for i in call.allowed() if loads[i].kv_capacity >= needed]
            return call.whole(max(fitting, key=lambda i: (loads[i].kv_capacity - loads[i].kv_tokens, -i)))
        groups = [members for members in call.nodes if call.home is None or call.home in members]
        able = [members for members in groups if call.fits(members)]
        members = max(
            able or self._groups(call.request, loads), key=lambda members: sum(loads[i].kv_capacity - loads[i].kv_tokens for i in members)
        )
        return self._spread(call, members, min(self._rule.max_degree, call.pages))

    def _spread(self, call: Call, members: Sequence[int], degree: int) -> Placement:
        """`degree` shards over the most free pools, by room now, else by capacity. Fewer where `members` are fewer, and where nobody pinned
        the degree and pools never give guests a page (--dyncp-max-guest-fraction)."""
        loads, levels = call.loads, call.levels
        ordered = sorted(members, key=lambda i: (loads[i].kv_tokens - loads[i].kv_capacity, levels.attention[i], i))
        home = call.home
        if home is None:
            home = min(ordered[:degree], key=lambda i: (levels.batches[i], levels.attention[i], i))
        guests = [i for i in ordered if i != home][: degree - 1]
        rooms: list[int] = []
        if call.request.degree is None:
            guests = [i for i in guests if call.rooms(i, waiting=True)[1] >= 1]
        for waiting in (False, True):
            rooms = [call.rooms(home, waiting=waiting)[0], *(call.rooms(i, waiting=waiting)[1] for i in guests)]
            if min(rooms) >= 1 and sum(rooms) >= call.pages:
                return self._split(call, home, guests, waiting=waiting)
        raise CapacityError(
            f"prompt_tokens = {call.request.prompt_tokens} ({call.pages} pages of {call.page_size}) do not fit {len(rooms)} shards "
            f"with room for {rooms} pages (dyncp pins, --dyncp-max-degree, --dyncp-max-guest-fraction {self._rule.guest_fraction})"
        )

    def _place_pinned(self, call: Call, degree: int) -> Placement:
        loads, needed = call.loads, (call.pages + 1) * call.page_size
        if degree == 1:
            single = self._best_single(call)
            if single is not None:
                return call.whole(single)
            fitting = [i for i in call.allowed() if loads[i].kv_capacity >= needed]
            if not fitting:
                return self._spread(call, range(len(loads)), 1)
            return call.whole(max(fitting, key=lambda i: (loads[i].kv_capacity - loads[i].kv_tokens, -i)))
        nodes = [members for members in call.nodes if len(members) >= degree and (call.home is None or call.home in members)]
        able = [members for members in nodes if call.fits(members, degree)]
        with_room = [members for members in able if sum(loads[i].free_tokens for i in members) >= needed]
        attention = call.levels.attention
        groups = with_room or able or self._groups(call.request, loads)
        group = min(groups, key=lambda members: sum(attention[i] for i in members) / len(members))
        return self._spread(call, group, degree)
