"""How a request may be split over instances: the one rule of the door, the policies, grants, growth, retraction and the simulator.

A request's pages lie on at most `max_degree` shards. Its home may give it the whole pool, any other instance `guest_pages` at admission
(growth of a guest that is there already is not bounded). Shards lie in the home's node; under --dyncp-scope cluster they leave it where
the node could never hold the request.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

GROWTH_SHARE = 100
"""Of a pool, the part that admission leaves to the growth of those that run is one in so many. Without it a full pool has them sit out,
with all their pages, until somebody ends. vLLM leaves as much (its watermark); SGLang's decode server, 512 tokens for each that runs."""

Split = tuple[tuple[int, int], ...]
"""(rank, pages) in sequence order; the last one is the tail."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Which instances share a node: `node_size` consecutive ranks each; the last node may have fewer.

    crosses: a request may have shards outside its home's node, where that could never hold it.
    """

    num_instances: int
    node_size: int
    crosses: bool = False

    def __post_init__(self) -> None:
        if self.num_instances < 1 or self.node_size < 1:
            raise ValueError(f"a layout of {self.num_instances} instances, {self.node_size} per node, has none")

    @property
    def nodes(self) -> list[int]:
        """The node of every rank."""
        return [self.node_of(rank) for rank in range(self.num_instances)]

    def node_of(self, rank: int) -> int:
        return rank // self.node_size

    def members(self, rank: int) -> range:
        """The ranks of this rank's node."""
        first = rank - rank % self.node_size
        return range(first, min(first + self.node_size, self.num_instances))

    def group(self, rank: int) -> range:
        """The ranks that may ever exchange rows with this one, itself included: where a request with this home may have shards."""
        return range(self.num_instances) if self.crosses else self.members(rank)

    @property
    def groups(self) -> list[range]:
        """All of them, each once, in order of rank."""
        return [self.group(first) for first in range(0, self.num_instances, self.num_instances if self.crosses else self.node_size)]

    @property
    def group_size(self) -> int:
        """Ranks of the largest group: most shards of a request."""
        return self.num_instances if self.crosses else min(self.node_size, self.num_instances)


@dataclass(frozen=True, slots=True)
class SplitRule:
    """What the flags say about any split, before the pools are known: most shards of a request (--dyncp-max-degree), and the fraction of a
    pool that new guests may take (--dyncp-max-guest-fraction), and whether shards may leave the home's node (--dyncp-scope cluster)."""

    max_degree: int
    guest_fraction: float = 1.0
    crosses: bool = False

    def guest_pages(self, pool_pages: int) -> int:
        """Most pages of a pool that new guests may take. The small addend keeps 0.29 x 100 at 29."""
        return min(pool_pages, int(self.guest_fraction * pool_pages + 1e-9))

    def reach_pages(self, pools: Sequence[int], degree: int | None = None, home: int | None = None) -> int:
        """Most pages of one request on empty pools of these sizes: the largest of them (or that at position `home`) whole, as home, and
        guest pages of the largest others, over at most `degree` shards where that is given."""
        first = max(range(len(pools)), key=pools.__getitem__) if home is None else home
        guests = sorted((self.guest_pages(pages) for position, pages in enumerate(pools) if position != first), reverse=True)
        return pools[first] + sum(guests[: (degree or self.max_degree) - 1])

    def limits(self, pool_pages: int, layout: Layout) -> SplitLimits:
        """For equal pools."""
        return SplitLimits(pool_pages, self.max_degree, self.guest_pages(pool_pages), layout)


@dataclass(frozen=True, slots=True)
class SplitLimits:
    """Pages per pool (all pools are equal), shards of one request, pages that new guests may take of a pool, and where the nodes are."""

    pool_pages: int
    max_degree: int
    guest_pages: int
    layout: Layout

    @property
    def reach_pages(self) -> int:
        """Most pages of one request, on an empty cluster."""
        return self._reach(self.layout.group_size)

    def left_to_growth(self, free: int, retained: int = 0) -> int:
        """Pages that admission leaves in a pool: none where nobody is in it (all its pages are free, or retained), nor where requests never
        grow elsewhere, for there SGLang's own rules hold."""
        grows = self.max_degree > 1 and self.guest_pages > 0
        return self.pool_pages // GROWTH_SHARE if grows and free + retained < self.pool_pages else 0

    def most_pages(self, home: int, rank: int) -> int:
        """Most pages that `rank` may give a request of `home` when it is admitted."""
        return self.pool_pages if rank == home else self.guest_pages

    def fits(self, home: int, split: Sequence[tuple[int, int]]) -> bool:
        """Whether an empty cluster could grant this split."""
        ranks, group = {rank for rank, _ in split}, self.layout.group(home)
        if not len(ranks) == len(split) <= self.max_degree:
            return False
        return all(rank in group and 0 < pages <= self.most_pages(home, rank) for rank, pages in split)

    def scope(self, home: int, pages: int) -> range:
        """Ranks that may hold shards of a request of so many pages: the home's node, or its group where the node could never hold it."""
        members = self.layout.members(home)
        return members if pages <= self._reach(len(members)) else self.layout.group(home)

    def split(self, home: int, pages: int, room: Sequence[int], kept: Sequence[tuple[int, int]] = ()) -> Split | None:
        """Pages over the instances with most room, so that as few as possible are used and they end equally empty; the home, when used,
        is last. None when they do not fit now.

        room[r]: pages that instance r can give this request. kept: (rank, pages) that the request has before these. Degree, scope and
        most pages of a rank then hold for the whole sequence: ranks that have some are shards already, also outside the scope, and come
        first.
        """
        before = dict(kept)
        scope = self.scope(home, pages + sum(before.values()))
        limits = {rank: max(0, min(room[rank], self.most_pages(home, rank) - before.get(rank, 0))) for rank in {*scope, *before}}
        others = sorted((rank for rank in scope if rank not in before), key=lambda rank: (-limits[rank], rank != home, rank))
        chosen = list(before)
        held = sum(limits[rank] for rank in chosen)
        for rank in others[: max(0, self.max_degree - len(before))]:
            if held >= pages:
                break
            chosen.append(rank)
            held += limits[rank]
        return _level(home, {rank: limits[rank] for rank in chosen}, held - pages) if held >= pages else None

    def whole(self, home: int, pages: int, room: Sequence[int], *, at_home: bool = True) -> Split | None:
        """All pages on one instance: the home where it has room, else where there is most, else where an empty pool would hold them.
        None where no pool can. at_home False: not on the home itself."""
        able = [rank for rank in self.scope(home, pages) if pages <= self.most_pages(home, rank) and (at_home or rank != home)]
        best = max(able, key=lambda rank: (room[rank] >= pages, rank == home, room[rank], -rank), default=None)
        return None if best is None else ((best, pages),)

    def complete(self, home: int, split: Sequence[tuple[int, int]], pages: int) -> Split | None:
        """This split with `pages` in all. What it lacks goes to the tail, then to the shards before it, then to new ones; what it has too
        much goes from the first. None when no split of so many pages can ever fit."""
        counts = {rank: min(count, self.most_pages(home, rank)) for rank, count in split[-self.max_degree :]}
        counts = {rank: count for rank, count in counts.items() if count > 0}
        missing = pages - sum(counts.values())
        for rank in counts:
            cut = min(max(0, -missing), counts[rank] - 1)
            counts[rank] -= cut
            missing += cut
        near = self.layout.members(home)
        others = sorted(self.scope(home, pages), key=lambda rank: (rank != home, rank not in near, rank))
        for rank in [*reversed(counts), *(rank for rank in others if rank not in counts)]:
            added = min(self.most_pages(home, rank) - counts.get(rank, 0), max(0, missing))
            if added and (rank in counts or len(counts) < self.max_degree):
                counts[rank] = counts.get(rank, 0) + added
                missing -= added
        if missing > 0:
            return self.split(home, pages, [self.pool_pages] * self.layout.num_instances)
        return tuple((rank, counts[rank]) for rank in _tail_last(counts, home, split[-1][0]))

    def _reach(self, num_pools: int) -> int:
        return self.pool_pages + (min(num_pools, self.max_degree) - 1) * self.guest_pages


def _tail_last(counts: dict[int, int], home: int, tail: int) -> list[int]:
    """The ranks in sequence order: new ones first, the old tail last, or the home where it has come in."""
    last = tail if tail in counts else home
    return sorted(counts, key=lambda rank: rank == last)


def _level(home: int, limits: dict[int, int], surplus: int) -> Split:
    """All of `limits` less `surplus` pages, taken so that the ranks end equally empty."""
    counts = {}
    for position, rank in enumerate(sorted(limits, key=limits.__getitem__)):
        spare = min(limits[rank], surplus // (len(limits) - position))
        counts[rank] = limits[rank] - spare
        surplus -= spare
    return tuple((rank, counts[rank]) for rank in sorted(counts, key=lambda rank: (rank == home, rank)) if counts[rank])
