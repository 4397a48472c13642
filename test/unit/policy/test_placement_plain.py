"""The placement that serves is written for speed; a plain one beside it must decide the same on random loads."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from math import exp

import pytest

from sglang_dcp.policy.cost_model import load_cost_model
from sglang_dcp.policy.dual_balance import NUM_PRICED_NODES, DualBalance
from sglang_dcp.policy.pricing import LARGEST_EXPONENT, OWN_WEIGHT, Levels, Split
from sglang_dcp.policy.split import build_placement, fill_level
from sglang_dcp.policy.split_limits import SplitRule
from sglang_dcp.policy.types import CapacityError, InstanceLoad, Placement, PlacementRequest

MODELS = ("deepseek-v3.h200", "deepseek-v3.h100", "kimi-k2.h200", "cpu")


def plain_water_fill(levels: Sequence[float], rooms: Sequence[int], pages: int, page_us: float) -> list[int]:
    """Whole pages up to a common height, again without the columns that are full, and what is left one page each."""
    if pages < len(levels) or min(rooms) < 1 or pages > sum(rooms):
        raise CapacityError("rooms")
    shares, heights = [1] * len(levels), [level + page_us for level in levels]
    while sum(shares) < pages:
        remaining, is_capped = pages - sum(shares), False
        still = [i for i in range(len(shares)) if shares[i] < rooms[i]]
        target = fill_level([heights[i] for i in still], remaining * page_us)
        for i in still:
            wanted = max(0, int((target - heights[i]) / page_us + 1e-9)) if heights[i] < target else 0
            given = min(wanted, rooms[i] - shares[i])
            is_capped |= given == rooms[i] - shares[i]
            shares[i], heights[i] = shares[i] + given, heights[i] + given * page_us
        if not is_capped:
            while sum(shares) < pages:
                lowest_first = sorted([i for i in still if shares[i] < rooms[i]], key=lambda i: heights[i])
                for i in lowest_first[: pages - sum(shares)]:
                    shares[i], heights[i] = shares[i] + 1, heights[i] + page_us
    return shares


class PlainLevels(Levels):
    """Every price is computed where it is asked for."""

    def lowest_smoothly(self, positions: Sequence[int], added_us: float) -> int:
        combine_us = self.cost.combine_us_per_request
        sharpness = 1.0 / max(combine_us, added_us / LARGEST_EXPONENT, 1e-9)

        def price(i: int) -> float:
            attention = exp(self.attention[i] * sharpness + (added_us - self.highest_attention) * sharpness)
            batch = exp(self.batches[i] * (combine_us * sharpness) + (1 - self.highest_batch) * (combine_us * sharpness))
            return attention + batch + OWN_WEIGHT * sharpness * (self.attention[i] + combine_us * self.batches[i])

        return min(positions, key=lambda i: (price(i), i))


class PlainBalance(DualBalance):
    """The same policy, one step after another."""

    def _call(self, *arguments):
        call = super()._call(*arguments)
        old = call.levels
        call.levels = PlainLevels(old.loads, old.cost, old.attention, old.batches, old.free, old.highest_attention, old.highest_batch)
        return call

    def _best_single(self, call) -> int | None:
        added, size = call.levels.request_us(call.total_tokens), call.page_size
        for tokens in (call.total_tokens, call.request.prompt_tokens):
            needed = (-(-tokens // size) + 1) * size
            fitting = [i for i in range(len(call.loads)) if call.levels.free[i] >= needed and call.home in (None, i)]
            if fitting:
                return call.levels.lowest_smoothly(fitting, added) if call.is_small else call.levels.lowest(fitting, added)
        return None

    def _candidate_nodes(self, call) -> list[Sequence[int]]:
        needed, priced = (call.pages + 1) * call.page_size, []
        nodes = [list(members) for members in call.nodes if call.home is None or call.home in members]
        for members in nodes:
            if sum(max(0, call.levels.free[i]) for i in members) >= needed:
                priced.append((sum([call.levels.attention[i] for i in members]) / len(members), len(priced), members))
        if not priced and not any(self._holds(call, members) for members in nodes):
            return [range(len(call.loads))]
        return [members for _, _, members in sorted(priced)[:NUM_PRICED_NODES]]

    def _holds(self, call, members: list[int]) -> bool:
        """One pool whole and guest pages of the others, as many as the degree allows."""
        pools = sorted((call.loads[i].kv_capacity // call.page_size for i in members), reverse=True)
        guests = [int(self._rule.guest_fraction * pages + 1e-9) for pages in pools[1:]]
        return pools[0] + sum(guests[: self._rule.max_degree - 1]) > call.pages

    def _best_split(self, call, members: Sequence[int], cheaper_than: float) -> Split | None:
        levels, home = call.levels, call.home
        able = [i for i in members if i != home and call.rooms(i, waiting=False)[1] >= 1]
        ordered = sorted(able, key=lambda i: levels.attention[i])
        if home is not None:
            if home not in members or levels.free[home] < 2 * call.page_size:
                return None
            ordered.insert(0, home)
        del ordered[min(self._rule.max_degree, call.pages) :]
        best: Split | None = None
        for degree in range(2, len(ordered) + 1):
            split = self._priced(call, ordered, degree)
            if split is not None and split.price < (cheaper_than if best is None else best.price):
                best = split
        return best

    def _priced(self, call, ordered: Sequence[int], degree: int) -> Split | None:
        """One degree: the home is the smallest batch with headroom, the shards end at one level."""
        levels, cost, prefix = call.levels, call.levels.cost, ordered[:degree]
        is_remote = call.loads[ordered[0]].node != call.loads[ordered[-1]].node
        homes = [i for i in prefix if levels.free[i] // call.page_size >= 2]
        if call.home is not None:
            homes = [i for i in homes if i == call.home]
        if not homes:
            return None
        home = min(homes, key=lambda i: levels.batches[i])
        rooms = [call.rooms(i, waiting=False)[i != home] for i in prefix]
        if sum(rooms) < call.pages:
            return None
        row_us = cost.attention_us_per_row + (cost.remote_exchange_us_per_row if is_remote else cost.exchange_us_per_row)
        fixed_us = 0.0
        if not any(load.guest_tokens for load in call.loads):
            fixed_us = cost.exchange_fixed_us + (cost.remote_exchange_fixed_us if is_remote else 0.0) + cost.sharded_fixed_us
        column = levels.request_us(call.total_tokens)
        for i in prefix:
            column += levels.attention[i]
        lone = cost.lone_row_us(call.total_tokens) / degree
        level = max((column + (degree - 1) * (2 * row_us)) / degree, levels.attention[prefix[-1]], lone)
        batch = levels.batches[home] + 1
        price = max(0.0, level - levels.highest_attention) + OWN_WEIGHT * level + (degree - 1) * (row_us + cost.sharded_row_us) + fixed_us
        price += cost.combine_us_per_request * (max(0, batch - levels.highest_batch) + OWN_WEIGHT * batch)
        return Split(price, home, tuple(i for i in prefix if i != home))

    def _split(self, call, home: int, guests: Sequence[int], *, waiting: bool) -> Placement:
        positions, cost = [home, *guests], call.levels.cost
        heights = [call.levels.attention[i] for i in positions]
        growth = call.total_tokens - call.request.prompt_tokens
        heights[0] += call.levels.request_us(growth) + len(guests) * cost.exchange_us_per_row
        rooms = [call.rooms(i, waiting=waiting)[i != home] for i in positions]
        shares = plain_water_fill(heights, rooms, call.pages, max(1e-9, cost.attention_us_per_token * call.page_size))
        ranks = [call.loads[i].rank for i in positions]
        return build_placement(ranks[0], ranks[0], dict(zip(ranks, shares, strict=True)), call.request.prompt_tokens, call.page_size)


def random_loads(draw: random.Random, count: int, pool: int) -> list[InstanceLoad]:
    """Nearly empty, mixed, nearly full (promises beyond the pool included); nodes of eight or smaller, in runs or interleaved."""
    fullest = draw.choice((pool // 4, pool, pool + pool // 30))
    emptiest = draw.choice((0, fullest // 2, fullest - fullest // 8))
    per_node, interleaved, has_guests = draw.choice((2, 4, 8)), draw.random() < 0.2, draw.random() < 0.8
    batches = draw.choice(((0, 3), (0, 80), (60, 70)))
    loads = []
    for i in range(count):
        tokens = draw.randint(emptiest, fullest)
        node = i % max(1, count // per_node) if interleaved else i // per_node
        loads.append(InstanceLoad(i, node, tokens, pool, tokens // 3 * has_guests, draw.randint(*batches)))
    return loads


@pytest.mark.parametrize("seed", range(4))
def test_the_served_placement_decides_as_the_plain_one(seed: int):
    draw, host, degrees = random.Random(seed), random.Random(1000 + seed), []
    for _ in range(400):
        count, page_size, pool = draw.choice((1, 2, 8, 16, 32, 144)), draw.choice((16, 64)), draw.choice((2_000, 50_000, 1_100_000))
        cost = load_cost_model(draw.choice(MODELS), count)
        if host.random() < 0.3:
            cost = replace(cost, sharded_step_fixed_us=host.uniform(0, 500), sharded_step_us_per_row=host.uniform(0, 50))
            cost = replace(cost, attention_us_per_unsplit_token=host.choice((0.0, host.uniform(0, 20 * cost.attention_us_per_token))))
        rule = SplitRule(draw.choice((count, count, count, min(2, count), 1)), draw.choice((1.0, 1.0, 1.0, 0.3, 0.0)))
        policies, loads = (DualBalance(cost, rule), PlainBalance(cost, rule)), random_loads(draw, count, pool)
        for _ in range(3):
            tokens = int(10 ** draw.uniform(0, 6.2))
            home = draw.choice((None, None, None, draw.randrange(count)))
            request = PlacementRequest(tokens, draw.choice((1, 600)), draw.choice((1, 4096)), draw.choice((None, None, None, 1, 3)), home)
            answers = [answer(policy, request, loads, page_size) for policy in policies]
            assert answers[0] == answers[1], (seed, request, loads)
            if isinstance(answers[0], Placement):
                degrees.append(answers[0].degree)
                loads[answers[0].home].home_requests += 1
                for rank, share in zip(answers[0].shards, answers[0].shard_tokens, strict=True):
                    loads[rank].kv_tokens += -(-share // page_size) * page_size
    assert sum(degree > 1 for degree in degrees) > 50 and sum(degree == 1 for degree in degrees) > 50 and max(degrees) >= 8


def answer(policy: DualBalance, request: PlacementRequest, loads: Sequence[InstanceLoad], page_size: int) -> Placement | str:
    """The placement, or how it was refused."""
    try:
        return policy.place(request, loads, page_size)
    except ValueError as error:
        return type(error).__name__
