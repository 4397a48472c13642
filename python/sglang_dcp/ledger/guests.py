"""A shard's book of guest pages: which of its pages hold which part of which remote request."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence

import numpy as np

from sglang_dcp.ledger.reservations import Key


class GuestBook:
    """Pages lent to remote homes. A page enters when granted and leaves when its home releases the handle."""

    def __init__(self) -> None:
        self._pages: dict[Key, list[tuple[int, int]]] = {}
        self._arrays: dict[Key, tuple[np.ndarray, np.ndarray]] = {}
        self.num_pages = 0

    def __len__(self) -> int:
        return len(self._pages)

    def lend(self, home: int, handle: int, first_index: int, pages: Sequence[int]) -> None:
        """Adds pages for sequence indices first_index, first_index + 1, ... of `home`'s `handle`."""
        held = self._pages.setdefault((home, handle), [])
        self._arrays.pop((home, handle), None)
        for page_index, page in enumerate(pages, first_index):
            entry = (page_index, page)
            position = bisect.bisect_left(held, (page_index, -1))
            if position < len(held) and held[position][0] == page_index:
                raise ValueError(f"home {home}, handle {handle}: page index {page_index} is lent already (page {held[position][1]})")
            held.insert(position, entry)
        self.num_pages += len(pages)

    def take_back(self, home: int, handle: int) -> list[int]:
        """Removes the handle and returns its pages (none when it held none here)."""
        held = self._pages.pop((home, handle), [])
        self._arrays.pop((home, handle), None)
        self.num_pages -= len(held)
        return [page for _, page in held]

    def pages_of(self, home: int, handle: int) -> Sequence[tuple[int, int]]:
        """(sequence page index, page) in ascending order."""
        return self._pages.get((home, handle), ())

    def arrays_of(self, home: int, handle: int) -> tuple[np.ndarray, np.ndarray]:
        """The same as int64 (sequence page indices, pages). Made anew only when pages came or went; not to be written to. KeyError
        for a request of which nothing is here."""
        key = home, handle
        if key not in self._arrays:
            pairs = np.array(self._pages[key], dtype=np.int64)
            self._arrays[key] = pairs[:, 0].copy(), pairs[:, 1].copy()
        return self._arrays[key]

    def all_pages(self) -> Iterator[int]:
        for held in self._pages.values():
            yield from (page for _, page in held)

    def handles(self) -> Sequence[Key]:
        return tuple(self._pages)
