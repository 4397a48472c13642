"""A shard's book of guest pages: which of its pages hold which part of which remote request."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence

import numpy as np

from sglang_dcp.ledger.reservations import Key


class GuestBook:
    """Pages lent to remote homes. A page enters when granted and leaves when its home releases the handle.

    num_pages: all of them; num_retained: those of requests that are over (`retain`), which the length and `handles` leave out.
    """

    def __init__(self) -> None:
        self._pages: dict[Key, list[tuple[int, int]]] = {}
        self._arrays: dict[Key, tuple[np.ndarray, np.ndarray]] = {}
        self._retained: dict[Key, np.ndarray] = {}
        self.num_pages = self.num_retained = 0

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
        held = self._take(home, handle)
        self.num_pages -= len(held)
        return [page for _, page in held]

    def retain(self, home: int, handle: int, num_pages: int) -> list[int]:
        """The request is over and its pages below sequence index num_pages stay. Returns the others, which do not."""
        held = self._take(home, handle)
        kept = [entry for entry in held if entry[0] < num_pages]
        if kept:
            self._retained[home, handle] = np.array(kept, dtype=np.int32)
            self.num_retained += len(kept)
        self.num_pages += len(kept) - len(held)
        return [page for page_index, page in held if page_index >= num_pages]

    def take_over(self, home: int, previous: int, handle: int, num_pages: int) -> list[int]:
        """`handle` gets the retained pages of `previous` below sequence index num_pages. Returns those behind."""
        held = self._take(home, previous)
        kept = [entry for entry in held if entry[0] < num_pages]
        if kept:
            self._pages[home, handle] = kept
        self.num_pages += len(kept) - len(held)
        return [page for page_index, page in held if page_index >= num_pages]

    def _take(self, home: int, handle: int) -> list[tuple[int, int]]:
        """Removes what the handle has here, retained or not. `num_pages` is the caller's to correct."""
        retained = self._retained.pop((home, handle), None)
        if retained is not None:
            self.num_retained -= len(retained)
            return [(page_index, page) for page_index, page in retained.tolist()]
        self._arrays.pop((home, handle), None)
        return self._pages.pop((home, handle), [])

    def retained_pages_of(self, home: int, handle: int) -> list[tuple[int, int]]:
        """(sequence page index, page) of a retained sequence, ascending."""
        retained = self._retained.get((home, handle))
        return [] if retained is None else [(page_index, page) for page_index, page in retained.tolist()]

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

    def all_retained_pages(self) -> Iterator[int]:
        for retained in self._retained.values():
            yield from retained[:, 1].tolist()

    def retained_handles(self) -> Sequence[Key]:
        return tuple(self._retained)

    def handles(self) -> Sequence[Key]:
        return tuple(self._pages)
