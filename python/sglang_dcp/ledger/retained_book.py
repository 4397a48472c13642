"""A home's retained sequences: which pages, and the digests by which a later prompt finds them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from sglang_dcp.ledger.page_ids import Page
from sglang_dcp.ledger.prefix_index import PrefixIndex


class RetainedBook:
    """By handle. A page costs 8 bytes beside its digest: a cluster retains millions.

    names: handles of the waiting requests that would go on from a sequence, by the sequence's. taken: sequences that one of them would take
    over, which are offered to nobody else. readers: handles that read the pages of a sequence, of running requests and of other sequences.
    num_local_pages: those in the own pool.
    """

    def __init__(self, home: int) -> None:
        self.home = home
        self.names: dict[int, set[int]] = {}
        self.taken: set[int] = set()
        self.readers: dict[int, set[int]] = {}
        self.num_local_pages = 0
        self._index = PrefixIndex()
        self._pages: dict[int, bytes] = {}
        self._borrowed: dict[int, tuple[int, int]] = {}  # handle of what is read, and its pages that are

    def __len__(self) -> int:
        return len(self._pages)

    def __contains__(self, handle: int) -> bool:
        return handle in self._pages

    def put(self, handle: int, pages: Sequence[Page], digests: bytes, base: int = 0, num_borrowed: int = 0) -> None:
        """pages: its own, behind the first num_borrowed of the sequence `base`, which it reads. digests: of its own (prefix_index.py)."""
        self._pages[handle] = np.array([(page.owner, page.number) for page in pages], dtype=np.int32).tobytes()
        self._index.put(handle, digests, num_borrowed)
        self.num_local_pages += self._num_local(handle)
        if base:
            self._borrowed[handle] = base, num_borrowed
            self.begin_reading(base, handle)

    def begin_reading(self, base: int, reader: int) -> None:
        self.readers.setdefault(base, set()).add(reader)

    def end_reading(self, base: int, reader: int) -> None:
        if base:
            self.readers[base].remove(reader)
            if not self.readers[base]:
                del self.readers[base]

    def take(self, handle: int) -> list[Page]:
        """Removes a sequence and returns its own pages in order. KeyError when it is not there."""
        self.num_local_pages -= self._num_local(handle)
        pages = self._own(handle).tolist()
        del self._pages[handle]
        self.end_reading(self._borrowed.pop(handle, (0, 0))[0], handle)
        self.names.pop(handle, None)
        self.taken.discard(handle)
        self._index.take(handle)
        return [Page(owner, number) for owner, number in pages]

    def release(self, handle: int) -> list[int]:
        """Likewise, and returns the numbers of those at home."""
        return [page.number for page in self.take(handle) if page.owner == self.home]

    def name(self, handle: int, waiting: int, *, takes: bool) -> None:
        """takes: the waiting request would take it over."""
        self.names.setdefault(handle, set()).add(waiting)
        if takes:
            self.taken.add(handle)

    def unname(self, handle: int, waiting: int) -> None:
        named = self.names.get(handle)
        if named is not None:
            named.discard(waiting)
            self.taken.discard(handle)  # who would take it over is the only one
            if not named:
                del self.names[handle]

    def matches(self, digests: bytes) -> list[tuple[int, int]]:
        """(handle, leading pages in common) of those on offer, the longest first, then the newest."""
        return [match for match in self._index.matches(digests) if match[0] not in self.taken]

    def is_shared(self, handle: int) -> bool:
        """Others read it, or are about to."""
        return handle in self.readers or handle in self.names

    def borrowed(self, handle: int) -> tuple[int, int]:
        """(handle of the sequence that this one reads, its pages that are read), 0 and 0 for none."""
        return self._borrowed.get(handle, (0, 0))

    def num_pages(self, handle: int) -> int:
        return self.borrowed(handle)[1] + len(self._own(handle))

    def pages(self, handle: int, num_pages: int) -> list[Page]:
        """The first pages of a sequence, those that it reads among them."""
        return [Page(owner, number) for owner, number in self._table(handle)[:num_pages].tolist()]

    def shards(self, handle: int, num_pages: int) -> tuple[tuple[int, int], ...]:
        """(instance, pages) of a sequence's first pages, ordered by the first page of each."""
        return _by_instance(self._table(handle)[:num_pages])

    def own_shards(self, handle: int) -> tuple[tuple[int, int], ...]:
        """The same of its own pages."""
        return _by_instance(self._own(handle))

    def handles(self) -> Sequence[int]:
        return tuple(self._pages)

    def pages_on(self, handle: int, rank: int) -> list[tuple[int, int]]:
        """(sequence page index, number) of its own on an instance, ascending."""
        pages, first = self._own(handle), self.borrowed(handle)[1]
        here = np.flatnonzero(pages[:, 0] == rank)
        return list(zip((here + first).tolist(), pages[here, 1].tolist(), strict=True))

    def local_pages(self) -> Iterator[int]:
        """Numbers of the pages of the own pool that retained sequences own."""
        for handle in self._pages:
            yield from (number for _, number in self.pages_on(handle, self.home))

    def _num_local(self, handle: int) -> int:
        return int((self._own(handle)[:, 0] == self.home).sum())

    def _table(self, handle: int) -> np.ndarray:
        """[pages, 2] int32: owner, number, of the whole sequence."""
        base, borrowed = self.borrowed(handle)
        return np.concatenate([self._table(base)[:borrowed], self._own(handle)]) if base else self._own(handle)

    def _own(self, handle: int) -> np.ndarray:
        """The same of its own pages. Kept as bytes: an array's own header costs more than the pages of a short sequence."""
        return np.frombuffer(self._pages[handle], dtype=np.int32).reshape(-1, 2)


def _by_instance(pages: np.ndarray) -> tuple[tuple[int, int], ...]:
    owners, first, counts = np.unique(pages[:, 0], return_index=True, return_counts=True)
    order = np.argsort(first)
    return tuple(zip(owners[order].tolist(), counts[order].tolist(), strict=True))
