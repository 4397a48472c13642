"""A shard's book of guest pages: which of its pages hold which part of which remote request."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence

import numpy as np

from sglang_dcp.ledger.reservations import Key


class GuestBook:
    """Pages lent to remote homes. A page enters when granted and leaves when its home releases the handle.

    num_pages: all of them; num_retained: those of requests that are over (`retain`), which the length and `handles` leave out. A page is
    counted under the handle that owns it; what a request reads of a retained sequence is among its `pages_of` all the same.
    """

    def __init__(self) -> None:
        self._pages: dict[Key, list[tuple[int, int]]] = {}
        self._arrays: dict[Key, tuple[np.ndarray, np.ndarray]] = {}
        self._retained: dict[Key, np.ndarray] = {}
        self._borrowed: dict[Key, tuple[int, int]] = {}  # handle of what is read, and its pages that are
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
        """Removes the handle and returns its own pages (none when it held none here)."""
        held = self._take(home, handle)
        self._borrowed.pop((home, handle), None)
        self.num_pages -= len(held)
        return [page for _, page in held]

    def retain(self, home: int, handle: int, num_pages: int) -> list[int]:
        """The request is over and its first num_pages own pages of the sequence stay. Returns the others, which do not."""
        held, end = self._take(home, handle), self._first_own(home, handle) + num_pages
        kept = [entry for entry in held if entry[0] < end]
        self._put_retained((home, handle), kept)
        self.num_pages += len(kept) - len(held)
        return [page for page_index, page in held if page_index >= end]

    def take_over(self, home: int, previous: int, handle: int, num_pages: int) -> list[int]:
        """`handle` gets the retained pages of `previous` below sequence index num_pages. Returns those behind."""
        entries = self._read(home, previous, num_pages)
        if entries:
            self._pages[home, handle] = entries
        held = self._take(home, previous)
        if (read := self._borrowed.pop((home, previous), None)) is not None:
            self._borrowed[home, handle] = read
        behind = [page for page_index, page in held if page_index >= num_pages]
        self.num_pages -= len(behind)
        return behind

    def borrow(self, home: int, base: int, handle: int, num_pages: int) -> None:
        """`handle` reads the pages of the retained `base` below sequence index num_pages."""
        self._borrowed[home, handle] = base, num_pages
        if entries := self._read(home, base, num_pages):
            self._pages[home, handle] = entries

    def share(self, home: int, handle: int, base: int, num_pages: int) -> None:
        """The first num_pages own pages of the sequence of `handle` are retained as `base` from now on, and `handle` reads them."""
        first = self._first_own(home, handle)
        own = [entry for entry in self._pages.get((home, handle), ()) if first <= entry[0] < first + num_pages]
        self._put_retained((home, base), own)
        if (read := self._borrowed.get((home, handle))) is not None:
            self._borrowed[home, base] = read
        self._borrowed[home, handle] = base, first + num_pages

    def _put_retained(self, key: Key, entries: Sequence[tuple[int, int]]) -> None:
        if entries:
            self._retained[key] = np.array(entries, dtype=np.int32)
            self.num_retained += len(entries)

    def _first_own(self, home: int, handle: int) -> int:
        """Sequence index of the first page that is not borrowed."""
        return self._borrowed.get((home, handle), (0, 0))[1]

    def _read(self, home: int, handle: int, num_pages: int) -> list[tuple[int, int]]:
        """Entries below sequence index num_pages of a retained sequence and of what it reads."""
        base, borrowed = self._borrowed.get((home, handle), (0, 0))
        before = self._read(home, base, min(borrowed, num_pages)) if base else []
        return before + [entry for entry in self.retained_pages_of(home, handle) if entry[0] < num_pages]

    def _take(self, home: int, handle: int) -> list[tuple[int, int]]:
        """Removes the handle's own pages here, retained or not. `num_pages` is the caller's to correct."""
        retained = self._retained.pop((home, handle), None)
        if retained is not None:
            self.num_retained -= len(retained)
            return [(page_index, page) for page_index, page in retained.tolist()]
        self._arrays.pop((home, handle), None)
        return self._own(self._pages.pop((home, handle), []), home, handle)

    def _own(self, entries: list[tuple[int, int]], home: int, handle: int) -> list[tuple[int, int]]:
        first = self._first_own(home, handle)
        return [entry for entry in entries if entry[0] >= first] if first else entries

    def retained_pages_of(self, home: int, handle: int) -> list[tuple[int, int]]:
        """(sequence page index, page) that a retained sequence owns, ascending."""
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
        """Those that guests own."""
        for key, held in self._pages.items():
            yield from (page for _, page in self._own(held, *key))

    def all_retained_pages(self) -> Iterator[int]:
        for retained in self._retained.values():
            yield from retained[:, 1].tolist()

    def retained_handles(self) -> Sequence[Key]:
        return tuple(self._retained)

    def handles(self) -> Sequence[Key]:
        return tuple(self._pages)
