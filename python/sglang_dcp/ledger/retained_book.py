"""A home's retained sequences: which pages, and the digests by which a later prompt finds them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from sglang_dcp.ledger.page_ids import Page
from sglang_dcp.ledger.prefix_index import PrefixIndex


class RetainedBook:
    """By handle. A page costs 8 bytes beside its digest: a cluster retains millions.

    names: handle of the waiting request that would take a sequence over, by the sequence's; each is offered to one at a time.
    num_local_pages: those in the own pool.
    """

    def __init__(self, home: int) -> None:
        self.home = home
        self.names: dict[int, int] = {}
        self.num_local_pages = 0
        self._index = PrefixIndex()
        self._pages: dict[int, bytes] = {}

    def __len__(self) -> int:
        return len(self._pages)

    def __contains__(self, handle: int) -> bool:
        return handle in self._pages

    def put(self, handle: int, pages: Sequence[Page], digests: bytes) -> None:
        """digests: of these pages (prefix_index.py)."""
        self._pages[handle] = np.array([(page.owner, page.number) for page in pages], dtype=np.int32).tobytes()
        self._index.put(handle, digests)
        self.num_local_pages += self._num_local(handle)

    def take(self, handle: int) -> list[Page]:
        """Removes a sequence and returns its pages in order. KeyError when it is not there."""
        self.num_local_pages -= self._num_local(handle)
        pages = self._table(handle).tolist()
        del self._pages[handle]
        self.names.pop(handle, None)
        self._index.take(handle)
        return [Page(owner, number) for owner, number in pages]

    def release(self, handle: int) -> list[int]:
        """Likewise, and returns the numbers of those at home."""
        return [page.number for page in self.take(handle) if page.owner == self.home]

    def matches(self, digests: bytes) -> list[tuple[int, int]]:
        """(handle, leading pages in common) of those on offer, the longest first, then the newest."""
        return [match for match in self._index.matches(digests) if match[0] not in self.names]

    def num_pages(self, handle: int) -> int:
        return len(self._table(handle))

    def shards(self, handle: int, num_pages: int) -> tuple[tuple[int, int], ...]:
        """(instance, pages) of a sequence's first pages, ordered by the first page of each."""
        owners, first, counts = np.unique(self._table(handle)[:num_pages, 0], return_index=True, return_counts=True)
        order = np.argsort(first)
        return tuple(zip(owners[order].tolist(), counts[order].tolist(), strict=True))

    def handles(self) -> Sequence[int]:
        return tuple(self._pages)

    def pages_on(self, handle: int, rank: int) -> list[tuple[int, int]]:
        """(sequence page index, number) of those on an instance, ascending."""
        pages = self._table(handle)
        here = np.flatnonzero(pages[:, 0] == rank)
        return list(zip(here.tolist(), pages[here, 1].tolist(), strict=True))

    def local_pages(self) -> Iterator[int]:
        """Numbers of the pages of the own pool that retained sequences own."""
        for handle in self._pages:
            yield from (number for _, number in self.pages_on(handle, self.home))

    def _num_local(self, handle: int) -> int:
        return int((self._table(handle)[:, 0] == self.home).sum())

    def _table(self, handle: int) -> np.ndarray:
        """[pages, 2] int32: owner, number. Kept as bytes: an array's own header costs more than the pages of a short sequence."""
        return np.frombuffer(self._pages[handle], dtype=np.int32).reshape(-1, 2)
