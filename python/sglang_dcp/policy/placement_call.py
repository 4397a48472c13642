"""One request on its way through dual balance, and the instances looked at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sglang_dcp.policy.pricing import Levels
from sglang_dcp.policy.split import free_pages, num_pages
from sglang_dcp.policy.split_limits import SplitRule
from sglang_dcp.policy.types import InstanceLoad, Placement, PlacementRequest


@dataclass(slots=True)
class Call:
    """One request and the instances looked at. All indices are positions in `loads`; ranks appear only in the answer.

    Never changed once made; not frozen, because making a frozen one takes microseconds of a placement's fifty.
    """

    request: PlacementRequest
    loads: Sequence[InstanceLoad]
    nodes: Sequence[Sequence[int]]
    levels: Levels
    page_size: int
    pages: int
    total_tokens: int
    home: int | None
    is_small: bool
    rule: SplitRule

    def allowed(self) -> Sequence[int]:
        """Where the home may be."""
        return range(len(self.loads)) if self.home is None else (self.home,)

    def fits_one_pool(self) -> bool:
        needed = (self.pages + 1) * self.page_size
        return any(self.loads[i].kv_capacity >= needed for i in self.allowed())

    def fits(self, members: Sequence[int], degree: int | None = None) -> bool:
        """Whether these instances, empty, could hold prompt and tail page, over at most `degree` shards where that is given."""
        home = None if self.home is None else members.index(self.home)
        pools = [self.loads[i].kv_capacity // self.page_size for i in members]
        return self.rule.reach_pages(pools, degree, home) > self.pages

    def rooms(self, position: int, *, waiting: bool) -> tuple[int, int]:
        """Pages that an instance could take as home (one page of headroom left) and as guest; `waiting` counts an empty pool."""
        load, page_size = self.loads[position], self.page_size
        pool = load.kv_capacity // page_size
        pages = pool if waiting else free_pages(load, page_size)
        if self.rule.guest_fraction >= 1.0:
            return pages - 1, pages
        guests = 0 if waiting else num_pages(load.guest_tokens, page_size)
        return pages - 1, min(pages, max(0, self.rule.guest_pages(pool) - guests))

    def whole(self, position: int) -> Placement:
        """All of the request on one instance, its home."""
        rank = self.loads[position].rank
        return Placement(home=rank, shards=(rank,), shard_tokens=(self.request.prompt_tokens,))


def as_range(members: Sequence[int]) -> Sequence[int]:
    """The same members as a range where they follow one another, so that `of` can slice."""
    run = range(members[0], members[-1] + 1)
    return run if list(run) == list(members) else members


def of(values: list, members: Sequence[int]) -> list:
    """The values of `members`."""
    return values[members.start : members.stop] if type(members) is range else [values[i] for i in members]
