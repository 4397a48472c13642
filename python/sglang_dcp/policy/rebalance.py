"""A variant that is simulated and not served: pages of running requests move off the hottest instance, inside its node.

One move per step at most, so a placement that time has made poor is repaired while it decodes. The caller charges the copy.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from sglang_dcp.policy.cost_model import CostModel

# A smaller move than this many pages is not worth a copy's launch.
MIN_MOVE_PAGES = 16
# A copy must have paid for itself after this many steps: by then others have come and gone (docs/log.md).
PAY_BACK_STEPS = 4


@dataclass(frozen=True, slots=True)
class Held:
    """Pages of one request per instance; only full pages that no decode step writes to may be counted."""

    identity: int
    home: int
    pages: Mapping[int, int]


@dataclass(frozen=True, slots=True)
class Move:
    """`num_pages` pages of a request go from one instance to another of the same node."""

    identity: int
    source: int
    target: int
    num_pages: int


def choose_move(
    levels: Sequence[float],
    nodes: Sequence[int],
    rooms: Sequence[int],
    on_hottest: Iterable[Held],
    cost: CostModel,
    page_size: int,
    *,
    max_pages: int,
    move_us_per_token: float,
) -> Move | None:
    """The move that lowers the hottest instance most, or None when none of `MIN_MOVE_PAGES` pays for its copy.

    `levels` are attention levels in microseconds per layer, `rooms` free pages that nothing is promised; `on_hottest` lists the
    requests with pages on the instance of the highest level (lowest rank of a tie). Half of the difference to the target is moved, less
    what a new routed row costs. At least one page stays, so no shard disappears. A step gets shorter by no more than the hottest
    stands above the second hottest, which bounds what a move saves.
    """
    source = max(range(len(levels)), key=lambda rank: (levels[rank], -rank))
    richest = max(on_hottest, key=lambda held: (held.pages.get(source, 0), -held.identity), default=None)
    if richest is None:
        return None
    page_us = cost.attention_us_per_token * page_size
    above_second = levels[source] - max((level for rank, level in enumerate(levels) if rank != source), default=0.0)
    worth_pages = int(PAY_BACK_STEPS * cost.num_layers * above_second / max(move_us_per_token * page_size, 1e-9))
    max_pages = min(max_pages, worth_pages)
    best: Move | None = None
    for target in range(len(levels)):
        if nodes[target] != nodes[source] or target == source:
            continue
        is_new_row = target not in richest.pages and target != richest.home
        gap = levels[source] - levels[target] - (cost.exchange_us_per_row if is_new_row else 0.0)
        pages = min(int(gap / (2 * page_us)), richest.pages.get(source, 0) - 1, rooms[target], max_pages)
        if pages >= MIN_MOVE_PAGES and (best is None or pages > best.num_pages or _is_lower(levels, target, pages, best)):
            best = Move(richest.identity, source, target, pages)
    return best


def _is_lower(levels: Sequence[float], target: int, pages: int, best: Move) -> bool:
    return pages == best.num_pages and levels[target] < levels[best.target]
