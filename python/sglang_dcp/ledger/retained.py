"""Sequences that outlived their request: their pages stay until a later request takes them over or somebody needs the room.

Every instance keeps this table alike. A sequence leaves it by one decision of one step: taken over by a grant, evicted, or released by its
home. So no two instances can differ about whose its pages are, and eviction needs no message. One that others read (readers.py) stays until
they are gone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from sglang_dcp.ledger.digest import MASK, digest
from sglang_dcp.ledger.readers import Key, Readers


@dataclass(frozen=True, slots=True)
class RetainedSequence:
    """pages: its own, (instance, pages), every instance once. last_used: the step in which its request was over."""

    pages: tuple[tuple[int, int], ...]
    last_used: int

    def on(self, rank: int) -> int:
        return sum(pages for owner, pages in self.pages if owner == rank)


class RetainedTable:
    """pages[r]: retained pages in the pool of instance r. evictable[r]: those of them that no running request reads.

    digest: of all sequences, the same on all instances, or they have gone apart.
    """

    def __init__(self, num_instances: int) -> None:
        self.pages = [0] * num_instances
        self.evictable = [0] * num_instances
        self.sequences: dict[Key, RetainedSequence] = {}
        self.readers = Readers()
        self._named: Counter[Key] = Counter()
        self.digest = 0

    def __len__(self) -> int:
        return len(self.sequences)

    def __contains__(self, key: Key) -> bool:
        return key in self.sequences

    def put(self, home: int, handle: int, pages: Sequence[tuple[int, int]], step: int) -> None:
        """pages: without those of the sequence that it reads. step: of the request's end; no put goes back behind the one before.
        ValueError for a handle that is retained already: none is ever used twice."""
        if (home, handle) in self.sequences:
            raise ValueError(f"home {home}, handle {handle} is retained already")
        sequence = self.sequences[home, handle] = RetainedSequence(tuple(pages), step)
        self._count((home, handle), sequence, 1)
        self._free(self.readers.rest((home, handle)), 1)

    def take(self, key: Key) -> RetainedSequence | None:
        """Removes a sequence, None when it is not there. ValueError while others read it."""
        sequence = self.sequences.get(key)
        if sequence is not None:
            self.readers.go(key)
            del self.sequences[key]
            self._count(key, sequence, -1)
        return sequence

    def take_over(self, key: Key, reader: Key) -> None:
        """A request that starts gets all its pages, and reads what it read."""
        base = self.readers.base_of(key)
        self.take(key)
        if base is not None:
            self.borrow(base, reader)

    def borrow(self, key: Key, reader: Key) -> None:
        """A request that starts reads its first pages: it stays as long as that runs, and is the last one used."""
        self._free(self.readers.start(key, reader), -1)
        for read in reversed(list(self.readers.lineage(key))):
            self.sequences[read] = self.sequences.pop(read)

    def share(self, home: int, handle: int, base: int, pages: Sequence[tuple[int, int]], step: int) -> None:
        """The first own pages of a request that runs become a sequence, `base`, which it reads from now on."""
        self.put(home, base, pages, step)
        self._free(self.readers.insert((home, base), (home, handle)), -1)

    def end(self, key: Key) -> None:
        """A request is over and leaves nothing, or its home gives its sequence up."""
        if self.take(key) is None:
            self._free(self.readers.end(key), 1)

    def name(self, key: Key) -> None:
        """An open ask would take the sequence over: it is evicted last."""
        self._named[key] += 1

    def unname(self, key: Key) -> None:
        self._named[key] -= 1
        if not self._named[key]:
            del self._named[key]

    def evictable_beside(self, spare: Key | None) -> list[int]:
        """Pages of every instance that could be evicted while `spare`, and what it reads, stay."""
        pages = list(self.evictable)
        for key in self.readers.lineage(spare) if spare in self.sequences else ():
            for rank, count in self.sequences[key].pages if not self.readers.is_read_by_running(key) else ():
                pages[rank] -= count
        return pages

    def choose(self, short: Mapping[int, int], spare: Key | None = None) -> list[Key] | None:
        """Sequences whose eviction frees `short[r]` pages on every instance r, in the order of eviction; None when all together do not.

        Those that an open ask names go last, then by last use, readers before what they read; `spare` is not touched. Nothing leaves the
        table.
        """
        left = {rank: pages for rank, pages in short.items() if pages > 0}
        if any(pages > self.evictable[rank] for rank, pages in left.items()):
            return None
        chosen: list[Key] = []
        gone: Counter[Key] = Counter()
        passed: set[Key] = set()

        def look_at(key: Key) -> None:
            nonlocal left
            if not left or key == spare or self.readers.is_read_by_running(key):
                return
            if self.readers.num_retained(key) > gone[key]:
                passed.add(key)
            elif any(rank in left for rank, _ in self._held_up_by(key)):
                chosen.append(key)
                here = self.sequences[key]
                left = {rank: pages - here.on(rank) for rank, pages in left.items() if pages > here.on(rank)}
                if (base := self.readers.base_of(key)) is not None:
                    gone[base] += 1
                    if base in passed:
                        look_at(base)

        for key in self._in_order():
            if not left:
                break
            look_at(key)
        return None if left else self._without_surplus(chosen, short)

    def _held_up_by(self, key: Key) -> Iterator[tuple[int, int]]:
        """(instance, pages) of a sequence and of what it reads, where that could go once it has gone."""
        for held in self.readers.lineage(key):
            if self.readers.is_read_by_running(held):
                return
            yield from self.sequences[held].pages

    def _without_surplus(self, chosen: list[Key], short: Mapping[int, int]) -> list[Key]:
        """The choice less what its later members made unneeded: the most recently used that can stay does, with what it reads."""
        surplus = Counter({rank: -pages for rank, pages in short.items() if pages > 0})
        for key in chosen:
            surplus.update({rank: pages for rank, pages in self.sequences[key].pages if rank in surplus})
        needed = dict.fromkeys(chosen)
        for key in reversed(chosen):
            pages = {rank: pages for rank, pages in self.sequences[key].pages if rank in surplus}
            if self.readers.base_of(key) not in needed and all(surplus[rank] >= count for rank, count in pages.items()):
                surplus.subtract(pages)
                del needed[key]
        return list(needed)

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
            self.evictable[rank] += sign * count

    def _free(self, keys: Iterable[Key], sign: int) -> None:
        """No running request reads them any more (1), or one does now (-1)."""
        for key in keys:
            for rank, count in self.sequences[key].pages:
                self.evictable[rank] += sign * count
