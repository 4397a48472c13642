"""What no grant may break, recounted from columns and messages alone: the code that decides about limits is not asked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from sglang_dcp.ledger import columns as col
from sglang_dcp.ledger.messages import AskAdmission, AskGrowth, decode
from sglang_dcp.ledger.reservations import Decision, Grant


class LimitChecks:
    """Looks at every step of a protocol walk. guest_pages: most pages of a pool that new guests may take. node_size: instances per node."""

    def __init__(
        self, num_instances: int, num_pages: int, max_degree: int, guest_pages: int, node_size: int, *, crosses: bool = False
    ) -> None:
        self.num_instances, self.num_pages, self.crosses = num_instances, num_pages, crosses
        self.max_degree, self.guest_pages, self.node_size = max_degree, guest_pages, node_size
        self.asks: dict[tuple[int, int], AskAdmission | AskGrowth] = {}

    def reach(self, num_pools: int) -> int:
        """Pages that `num_pools` pools hold of one request: one of them whole, as home."""
        return self.num_pages + (min(num_pools, self.max_degree) - 1) * self.guest_pages

    def members(self, home: int) -> range:
        first = home // self.node_size * self.node_size
        return range(first, min(first + self.node_size, self.num_instances))

    def group(self, home: int) -> range:
        """Where anything of this home may ever lie."""
        return range(self.num_instances) if self.crosses else self.members(home)

    @property
    def most_pages(self) -> int:
        """Of one request."""
        return self.reach(self.num_instances if self.crosses else self.node_size)

    def members_for(self, home: int, pages: int) -> range:
        """Where a flexible placement of so many pages may lie."""
        return self.members(home) if pages <= self.reach(self.node_size) else self.group(home)

    def check_step(self, columns: Sequence[Sequence[int]], words: Sequence[Sequence[int]], decision: Decision) -> None:
        """columns, words: of every instance in this step; decision: what came of them."""
        for home, stream in enumerate(words):
            for message in decode(stream):
                if isinstance(message, AskAdmission | AskGrowth):
                    self.asks[home, message.handle] = message
        room = [row[col.FREE_PAGES] for row in columns]
        guest_room = [self.guest_pages - row[col.GUEST_PAGES] for row in columns]
        is_empty = room == [self.num_pages] * self.num_instances
        for grant in decision.grants:
            ask = self.asks.pop((grant.home, grant.handle))
            if isinstance(ask, AskAdmission):
                self._check_admission(ask, grant, guest_room)
            else:
                self._check_growth(ask, grant, room, guest_room)
            for rank, pages in self._taken_over(ask, grant):
                guest_room[rank] -= pages
            for segment in grant.segments:
                room[segment.rank] -= segment.num_pages
                guest_room[segment.rank] -= segment.num_pages if segment.rank != grant.home else 0
        assert decision.grants or not (is_empty and any(decision.promised)), f"promised for ever on an empty cluster: {decision}"

    def _check_admission(self, ask: AskAdmission, grant: Grant, guest_room: Sequence[int]) -> None:
        ranks = {segment.rank for segment in grant.segments} | {rank for rank, _ in ask.kept if grant.previous}
        assert len(ranks) <= self.max_degree, f"degree {len(ranks)} where {self.max_degree} is the most: {grant}"
        assert ranks <= set(self.group(grant.home)), f"{grant} lies outside {self.group(grant.home)}, where its home exchanges rows"
        guests = Counter(dict(self._taken_over(ask, grant)))
        guests.update({segment.rank: segment.num_pages for segment in grant.segments if segment.rank != grant.home})
        assert all(pages <= guest_room[rank] for rank, pages in guests.items()), f"{guest_room} pages do not hold {guests} of {grant}"
        fits_the_node = sum(pages for _, pages in ask.whole) <= self.reach(self.node_size)
        if ask.flexible and fits_the_node:
            assert {segment.rank for segment in grant.segments} <= {*self.members(grant.home), *(rank for rank, _ in ask.kept)}, (
                f"{grant} leaves the node of its home, which could hold it"
            )

    def _check_growth(self, ask: AskGrowth, grant: Grant, room: Sequence[int], guest_room: Sequence[int]) -> None:
        rank = grant.segments[0].rank
        if rank in ask.shards:
            return
        assert rank in self.group(grant.home), f"{grant} lies outside {self.group(grant.home)}, where its home exchanges rows"
        assert len(set(ask.shards)) < self.max_degree, f"degree {len(set(ask.shards)) + 1} where {self.max_degree} is the most: {grant}"
        assert rank == grant.home or guest_room[rank] >= 1, f"guest room {guest_room} does not hold {grant}"
        fits_the_node = ask.page_index + 1 <= self.reach(self.node_size)
        assert not fits_the_node or rank in self.members(grant.home), f"{grant} leaves the node of its home, which could hold it"

    def _taken_over(self, ask: AskAdmission | AskGrowth, grant: Grant) -> list[tuple[int, int]]:
        """(instance, pages) of a retained sequence that become guests' again, where guests may have a part of a pool."""
        taken = ask.taken if isinstance(ask, AskAdmission) and grant.previous and self.guest_pages < self.num_pages else ()
        return [(rank, pages) for rank, pages in taken if rank != grant.home]
