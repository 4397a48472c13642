"""Sequences that outlived their request: their pages stay until a later request takes them over or somebody needs the room.

Every instance keeps this table alike. A sequence leaves it by one decision of one step: taken over by a grant, evicted, or released by its
home. So no two instances can differ about whose its pages are, and eviction needs no message.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from sglang_dcp.ledger.digest import MASK, digest

Key = tuple[int, int]
"""(home, handle)"""


@dataclass(frozen=True, slots=True)
class RetainedSequence:
    """pages: (instance, pages), every instance once. last_used: the step in which its request was over."""

    pages: tuple[tuple[int, int], ...]
    last_used: int

    def on(self, rank: int) -> int:
        return sum(pages for owner, pages in self.pages if owner == rank)


class RetainedTable:
    """pages[r]: retained pages in the pool of instance r.

    digest: of all sequences, the same on all instances, or they have gone apart.
    """

    def __init__(self, num_instances: int) -> None:
        self.pages = [0] * num_instances
        self.sequences: dict[Key, RetainedSequence] = {}
        self._named: Counter[Key] = Counter()
        self.digest = 0

    def __len__(self) -> int:
        return len(self.sequences)

    def __contains__(self, key: Key) -> bool:
        return key in self.sequences

    def put(self, home: int, handle: int, pages: Sequence[tuple[int, int]], step: int) -> None:
        """step: of the request's end; no put goes back behind the one before. ValueError for a handle that is retained already: none is
        ever used twice."""
        if (home, handle) in self.sequences:
            raise ValueError(f"home {home}, handle {handle} is retained already")
        sequence = self.sequences[home, handle] = RetainedSequence(tuple(pages), step)
        self._count((home, handle), sequence, 1)

    def take(self, key: Key) -> RetainedSequence | None:
        """Removes a sequence, None when it is not there."""
        sequence = self.sequences.pop(key, None)
        if sequence is not None:
            self._count(key, sequence, -1)
        return sequence

    def pages_of(self, key: Key) -> tuple[tuple[int, int], ...]:
        """(instance, pages) of a sequence, none when it is not there."""
        sequence = self.sequences.get(key)
        return () if sequence is None else sequence.pages

    def name(self, key: Key) -> None:
        """An open ask would take the sequence over: it is evicted last."""
        self._named[key] += 1

    def unname(self, key: Key) -> None:
        self._named[key] -= 1
        if not self._named[key]:
            del self._named[key]

    def choose(self, short: Mapping[int, int], spare: Key | None = None) -> list[Key] | None:
        """Sequences whose eviction frees `short[r]` pages on every instance r, in the order of eviction; None when all together do not.

        Those that an open ask names go last, then by last use; `spare` is not touched. Nothing leaves the table.
        """
        left = {rank: pages for rank, pages in short.items() if pages > 0}
        if any(pages > self.pages[rank] for rank, pages in left.items()):
            return None
        chosen: list[Key] = []
        for key in self._in_order():
            if not left:
                break
            here = self.sequences[key]
            if key != spare and any(rank in left for rank, _ in here.pages):
                chosen.append(key)
                left = {rank: pages - here.on(rank) for rank, pages in left.items() if pages > here.on(rank)}
        return None if left else self._without_surplus(chosen, short)

    def _without_surplus(self, chosen: list[Key], short: Mapping[int, int]) -> list[Key]:
        """The choice less what its later members made unneeded: the most recently used that can stay does."""
        surplus = Counter({rank: -pages for rank, pages in short.items() if pages > 0})
        for key in chosen:
            surplus.update({rank: pages for rank, pages in self.sequences[key].pages if rank in surplus})
        needed = list(chosen)
        for key in reversed(chosen):
            pages = {rank: pages for rank, pages in self.sequences[key].pages if rank in surplus}
            if all(surplus[rank] >= count for rank, count in pages.items()):
                surplus.subtract(pages)
                needed.remove(key)
        return needed

    def _in_order(self) -> Iterator[Key]:
        """As they were put, on every instance alike: a step that evicts must not sort them all."""
        yield from (key for key in self.sequences if key not in self._named)
        yield from (key for key in self.sequences if key in self._named)

    def _count(self, key: Key, sequence: RetainedSequence, sign: int) -> None:
        """A sequence comes or goes. The digest is a sum, as OpenDigest's, which would keep the digest of every sequence."""
        words = (*key, sequence.last_used, *(word for pair in sequence.pages for word in pair))
        self.digest = self.digest + sign * digest(words) & MASK
        for rank, count in sequence.pages:
            self.pages[rank] += sign * count
