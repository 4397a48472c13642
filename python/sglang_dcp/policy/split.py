"""Dividing a prompt's pages over shards, and the checks every policy shares."""

from __future__ import annotations

from collections.abc import Sequence

from sglang_dcp.policy.split_limits import SplitRule
from sglang_dcp.policy.types import CapacityError, InstanceLoad, Placement, PlacementRequest


def num_pages(tokens: int, page_size: int) -> int:
    """Pages that hold `tokens`."""
    return -(-tokens // page_size)


def free_pages(load: InstanceLoad, page_size: int) -> int:
    """Whole pages that are neither held nor promised."""
    return max(0, load.kv_capacity - load.kv_tokens) // page_size


def check_request(request: PlacementRequest, capacity_tokens: int, where: str) -> None:
    """Raises CapacityError when prompt and output cannot fit `capacity_tokens` of an empty `where`; ValueError for a bad length."""
    if request.prompt_tokens < 1 or request.max_new_tokens < 0:
        raise ValueError(f"prompt_tokens must be >= 1 and max_new_tokens >= 0, got {request.prompt_tokens} and {request.max_new_tokens}")
    needed = request.prompt_tokens + request.max_new_tokens
    if needed > capacity_tokens:
        raise CapacityError(
            f"prompt_tokens + max_new_tokens = {request.prompt_tokens} + {request.max_new_tokens} = {needed} tokens exceed "
            f"{capacity_tokens}, the KV capacity of {where} (--mem-fraction-static, --max-total-tokens)"
        )


def check_pins(request: PlacementRequest, num_instances: int, max_degree: int, page_size: int) -> None:
    """Raises ValueError, naming value and limit, for a pinned degree or home that no placement can honour."""
    if request.home is not None and not 0 <= request.home < num_instances:
        raise ValueError(f"dyncp.home = {request.home} is outside 0..{num_instances - 1}")
    if request.degree is None:
        return
    if not 1 <= request.degree <= num_instances:
        raise ValueError(f"dyncp.degree = {request.degree} is outside 1..{num_instances}, the number of instances")
    if request.degree > max_degree:
        raise ValueError(f"dyncp.degree = {request.degree} exceeds --dyncp-max-degree {max_degree}")
    pages = num_pages(request.prompt_tokens, page_size)
    if request.degree > pages:
        raise ValueError(
            f"dyncp.degree = {request.degree} needs one page per shard, but a prompt of {request.prompt_tokens} tokens "
            f"has {pages} pages of {page_size}"
        )


def fill_level(levels: Sequence[float], amount: float) -> float:
    """Height T to which `amount`, poured over columns that already stand at `levels`, rises: sum(max(0, T - level)) = amount."""
    ordered = sorted(levels)
    total = amount
    for count, level in enumerate(ordered, start=1):
        total += level
        height = total / count
        if count == len(ordered) or height <= ordered[count]:
            return height
    raise ValueError("fill_level needs at least one column")


def water_fill(levels: Sequence[float], rooms: Sequence[int], pages: int, page_us: float) -> list[int]:
    """Pages per column, at least one each and at most `rooms`, so that the highest column ends as low as it can.

    A page raises a column by `page_us`. Raises CapacityError when `pages` is below the number of columns or above the rooms.
    """
    count = len(levels)
    if pages < count or min(rooms) < 1 or pages > sum(rooms):
        raise CapacityError(
            f"{pages} pages cannot be divided over {count} shards with room for {list(rooms)} pages "
            "(dyncp.degree, --dyncp-max-guest-fraction, --max-total-tokens)"
        )
    page_us = max(page_us, 1e-9)
    shares = [1] * count
    heights = [level + page_us for level in levels]
    remaining = pages - count
    open_columns: Sequence[int] = range(count) if min(rooms) > 1 else [i for i in range(count) if rooms[i] > 1]
    while remaining > 0:
        target = fill_level(heights if len(open_columns) == count else [heights[i] for i in open_columns], remaining * page_us)
        poured, is_capped = 0, False
        for i in open_columns:
            height = heights[i]
            if height < target:
                extra = int((target - height) / page_us + 1e-9)
                if extra >= rooms[i] - shares[i]:
                    extra, is_capped = rooms[i] - shares[i], True
                shares[i] += extra
                heights[i] = height + extra * page_us
                poured += extra
        remaining -= poured
        if not is_capped:
            # Every column is within a page of the target, so what is left is less than a page for each that is below it.
            if remaining > 0:
                _pour_singly(shares, heights, rooms, remaining, page_us)
            break
        open_columns = [i for i in open_columns if shares[i] < rooms[i]]
    return shares


def _pour_singly(shares: list[int], heights: list[float], rooms: Sequence[int], remaining: int, page_us: float) -> None:
    """What is left after pouring whole pages evenly: one page each, lowest columns first."""
    while remaining > 0:
        columns = sorted([i for i in range(len(shares)) if shares[i] < rooms[i]], key=heights.__getitem__)
        for i in columns[:remaining]:
            shares[i] += 1
            heights[i] += page_us
        remaining -= len(columns[:remaining])


def build_placement(home: int, tail: int, pages_of: dict[int, int], prompt_tokens: int, page_size: int) -> Placement:
    """A placement from pages per rank; the tail, last in sequence, takes the prompt's partial page."""
    others = sorted([rank for rank in pages_of if rank != tail])
    tokens = [pages_of[rank] * page_size for rank in others]
    return Placement(home, (*others, tail), (*tokens, prompt_tokens - sum(tokens)))


def reach_of(
    rule: SplitRule,
    request: PlacementRequest,
    loads: Sequence[InstanceLoad],
    group: Sequence[int],
    page_size: int,
    degree: int | None = None,
) -> int:
    """Pages of one request that the group's pools hold, empty, over at most `degree` shards (None: as many as the rule allows)."""
    home = None if request.home is None else group.index(request.home)
    most = min(degree or rule.max_degree, len(group))
    return rule.reach_pages([loads[rank].kv_capacity // page_size for rank in group], most, home)


def node_members(loads: Sequence[InstanceLoad]) -> list[list[int]]:
    """Ranks per node, in order of the node's number. Raises ValueError unless loads[i].rank == i."""
    members: dict[int, list[int]] = {}
    for position, load in enumerate(loads):
        if load.rank != position:
            raise ValueError(f"loads must be in rank order: position {position} holds rank {load.rank}")
        members.setdefault(load.node, []).append(position)
    return [members[node] for node in sorted(members)]
