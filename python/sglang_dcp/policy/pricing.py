"""What a placement would add to a step, from levels that are computed once per request.

Instance i stands at an *attention level* a_i (KV tokens, rows and dispatch of its batch) and a *batch* b_i (combine). A layer lasts
max(a) + combine_us * max(b), so a candidate that leaves its instance at (a, b) is priced by how far it raises either maximum, plus a
small share of its own levels that keeps valleys open for those who come next. Where long rows are not split within an instance
(--dyncp-split-budget stock), no level is below what the request's own row takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, inf

from sglang_dcp.policy.cost_model import CostModel
from sglang_dcp.policy.types import InstanceLoad

# Weight of an instance's own levels beside what the candidate adds to the maxima (docs/log.md).
OWN_WEIGHT = 0.1
# Keeps the smooth maximum finite for cost models whose combine costs nothing.
LARGEST_EXPONENT = 32.0


@dataclass(slots=True)
class Levels:
    """Levels of the instances looked at, by position in `loads`; microseconds per layer. `free` are tokens, below 0 when overdrawn."""

    loads: Sequence[InstanceLoad]
    cost: CostModel
    attention: list[float]
    batches: list[int]
    free: list[int]
    highest_attention: float
    highest_batch: int

    @classmethod
    def of(cls, loads: Sequence[InstanceLoad], cost: CostModel) -> Levels:
        """Reads KV tokens and batch of every load once; one plain loop is faster than a comprehension per list."""
        token_us = cost.attention_us_per_token
        request_us = cost.dispatch_us_per_request + cost.attention_us_per_row
        attention, batches, free = [], [], []
        for load in loads:
            tokens, batch = load.kv_tokens, load.home_requests
            attention.append(token_us * tokens + request_us * batch)
            batches.append(batch)
            free.append(load.kv_capacity - tokens)
        return cls(loads, cost, attention, batches, free, max(attention), max(batches))

    def request_us(self, tokens: int) -> float:
        """What a whole request adds to the attention level of the instance that is home to it and holds all of it."""
        return self.cost.attention_us_per_token * tokens + self.cost.dispatch_us_per_request + self.cost.attention_us_per_row

    def is_exchanging(self) -> bool:
        """Whether a step has routed rows already, so that one more pays no fixed part. A loop: it mostly ends at the first load."""
        for load in self.loads:  # noqa: SIM110
            if load.guest_tokens:
                return True
        return False

    def least_price_whole(self, added_us: float, lone_us: float) -> float:
        """No instance takes a request that adds `added_us`, and takes `lone_us` by itself, at a lower price."""
        return self.price(max(min(self.attention) + added_us, lone_us), min(self.batches) + 1)

    def price(self, attention: float, batch: int) -> float:
        """Price of leaving one instance, and none higher, at these levels."""
        combine_us = self.cost.combine_us_per_request
        raised = max(0.0, attention - self.highest_attention) + combine_us * max(0, batch - self.highest_batch)
        return raised + OWN_WEIGHT * (attention + combine_us * batch)

    def lowest_smoothly(self, positions: Sequence[int], added_us: float) -> int:
        """Position that a small request raises least under a smooth maximum over both axes.

        Many small requests shape the levels for the rare long ones, so they look at the whole slope below the maximum; the
        smoothing width is what one request adds to the combine, or where that is next to nothing, a part of what it adds to attention.
        """
        combine_us = self.cost.combine_us_per_request
        # No level is above the highest, so no exponent is above LARGEST_EXPONENT.
        sharpness = 1.0 / max(combine_us, added_us / LARGEST_EXPONENT, 1e-9)
        # Positions in rising order, so as many as there are levels are all of them.
        everywhere = len(positions) == len(self.attention)
        a = self.attention if everywhere else [self.attention[i] for i in positions]
        b = self.batches if everywhere else [self.batches[i] for i in positions]
        a_shift = (added_us - self.highest_attention) * sharpness
        b_scale = combine_us * sharpness
        b_shift = (1 - self.highest_batch) * b_scale
        own = OWN_WEIGHT * sharpness
        prices = [exp(x * sharpness + a_shift) + exp(y * b_scale + b_shift) + own * (x + combine_us * y) for x, y in zip(a, b, strict=True)]
        return positions[prices.index(min(prices))]

    def lowest(self, positions: Sequence[int], added_us: float) -> int:
        """Position where a request that may dominate the step is cheapest whole."""
        combine_us, own = self.cost.combine_us_per_request, OWN_WEIGHT
        a, b = self.attention, self.batches
        summit, most = self.highest_attention - added_us, self.highest_batch
        prices = [(a[i] - summit if a[i] > summit else 0.0) + own * a[i] + combine_us * (own * b[i] + (b[i] == most)) for i in positions]
        return positions[prices.index(min(prices))]


@dataclass(slots=True)
class Split:
    """A priced division: positions of the home (the tail) and of the other shards."""

    price: float
    home: int
    guests: tuple[int, ...]


def cheapest_split(
    levels: Levels,
    ordered: Sequence[int],
    guest_rooms: Sequence[int] | None,
    *,
    page_size: int,
    pages: int,
    total_tokens: int,
    pinned_home: int | None,
    is_remote: bool,
    cheaper_than: float = inf,
) -> Split | None:
    """Cheapest degree >= 2 over prefixes of `ordered` (positions, lowest attention level first; a pinned home stands first).

    Rooms are pages per entry of `ordered` (None: every free page); a home keeps one page of its free ones as headroom. Water-filled,
    k shards end at one common level; the home is the smallest batch among them. None when no prefix with room for `pages` is priced
    below `cheaper_than`.
    """
    cost, a, b, free = levels.cost, levels.attention, levels.batches, levels.free
    row_us = cost.attention_us_per_row + (cost.remote_exchange_us_per_row if is_remote else cost.exchange_us_per_row)
    fixed_us = 0.0
    if not levels.is_exchanging():
        fixed_us = cost.exchange_fixed_us + (cost.remote_exchange_fixed_us if is_remote else 0.0) + cost.sharded_fixed_us
    column, room, home, headroom = levels.request_us(total_tokens), 0, -1, 0
    best_price, best_degree, best_home = cheaper_than, 0, -1
    highest, most, combine_us, own = levels.highest_attention, levels.highest_batch, cost.combine_us_per_request, OWN_WEIGHT
    batch, batch_us, double_us, may_change = 0, 0.0, 2 * row_us, pinned_home is None
    lone_us = cost.lone_row_us(total_tokens)
    row_us += cost.sharded_row_us
    for entry, position in enumerate(ordered):
        lowest = a[position]
        column += lowest
        free_pages = free[position] // page_size
        guest_room = free_pages if guest_rooms is None else guest_rooms[entry]
        room += guest_room
        if (home < 0 or (may_change and b[position] < batch - 1)) and free_pages > 1:
            home, headroom, batch = position, guest_room - free_pages + 1, b[position] + 1
            batch_us = combine_us * ((batch - most if batch > most else 0) + own * batch)
        if entry == 0 or room - headroom < pages or home < 0:
            continue
        level = max((column + entry * double_us) / (entry + 1), lowest, lone_us / (entry + 1))
        price = (level - highest if level > highest else 0.0) + own * level + entry * row_us + fixed_us
        price += batch_us
        if price < best_price:
            best_price, best_degree, best_home = price, entry + 1, home
    if best_degree == 0:
        return None
    return Split(best_price, best_home, tuple([position for position in ordered[:best_degree] if position != best_home]))
