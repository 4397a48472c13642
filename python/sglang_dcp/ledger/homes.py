"""A home's book of its managed requests: those whose pages come from reservations, here or elsewhere."""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sglang_dcp.ledger.messages import Granted
from sglang_dcp.ledger.page_ids import Page, PageIds
from sglang_dcp.ledger.reservations import Grant
from sglang_dcp.ledger.retained_book import RetainedBook
from sglang_dcp.policy.prefix_digests import DIGEST_BYTES


@dataclass
class HomeRequest:
    """One managed request.

    pages: one entry per page of the sequence, in order; None where the grant is known and the page number has not arrived yet.
    num_tree_pages: leading pages that the prefix cache owns (never freed by us).
    starts: of every owner, the sequence index of its first page. page_counts: of every owner, its pages. own_pages: (index, number) of
    the pages at home, ascending. num_missing: the Nones in pages. The four follow from `pages`; a step must not walk a long request's.
    granted_pages: of every owner, its pages and those whose numbers have not arrived.
    previous: handle of the retained sequence that its ask would go on from, 0 for none. num_kept: pages that it took over or borrowed.
    base: handle of the retained sequence that it reads, 0 for none; num_borrowed: leading pages that are that one's.
    route_at: the page index of a row's last token and the row's route, as found last (positions.py).
    owner: whoever opened it keeps here what it needs when the request is over.
    """

    handle: int
    born: int
    pages: list[Page | None] = field(default_factory=list)
    num_tree_pages: int = 0
    asked_admission: bool = False
    admitted: bool = False
    asked_growth: bool = False
    asked_stuck: bool = False
    start_degree: int = 0
    starts: dict[int, int] = field(default_factory=dict)
    page_counts: dict[int, int] = field(default_factory=dict)
    own_pages: list[tuple[int, int]] = field(default_factory=list)
    num_missing: int = 0
    granted_pages: dict[int, int] = field(default_factory=dict)
    previous: int = 0
    num_kept: int = 0
    base: int = 0
    num_borrowed: int = 0
    owner: Any = field(default=None, compare=False, repr=False)
    route_at: tuple[int, int | None] = field(default=(-1, None), compare=False, repr=False)
    _arrays: tuple[np.ndarray, np.ndarray] | None = field(default=None, compare=False, repr=False)

    @property
    def first_own(self) -> int:
        """Index of the first page that is its own."""
        return max(self.num_tree_pages, self.num_borrowed)

    @property
    def ready(self) -> bool:
        """All pages that were granted have arrived."""
        return self.admitted and not self.num_missing

    @property
    def shards(self) -> tuple[int, ...]:
        """Distinct owners in sequence order of their first page."""
        return tuple(sorted(self.starts, key=self.starts.__getitem__))

    def active_shards(self, num_tokens: int, page_size: int) -> Iterator[int]:
        """Owners of the first num_tokens tokens, in any order."""
        return (owner for owner, start in self.starts.items() if start * page_size < num_tokens)

    def page_arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """int64 (owners, numbers) of the pages that are known. A page that is known stays: only new ones are looked at. Not to be written
        to."""
        known = (np.zeros(0, dtype=np.int64),) * 2 if self._arrays is None else self._arrays
        new = self.pages[len(known[0]) :]
        if not new:
            return known
        pairs = np.array([(page.owner, page.number) for page in new if page is not None], dtype=np.int64).reshape(-1, 2)
        arrays = np.concatenate([known[0], pairs[:, 0]]), np.concatenate([known[1], pairs[:, 1]])
        if len(pairs) == len(new):
            self._arrays = arrays
        return arrays

    def tokens_per_shard(self, num_tokens: int, page_size: int) -> dict[int, int]:
        """Of the first num_tokens tokens, how many each shard holds, in sequence order; shards without any are left out.

        From the counts, less what the last pages do not hold (yet): only the pages behind the last token are looked at.
        """
        tokens = {owner: self.page_counts[owner] * page_size for owner in self.shards}
        for index in range(num_tokens // page_size, len(self.pages)):
            page = self.pages[index]
            if page is not None:
                tokens[page.owner] -= min(page_size, (index + 1) * page_size - num_tokens)
        return {owner: count for owner, count in tokens.items() if count}


class HomeBook:
    """Managed requests of one home, by handle, and the way back from a page id to the handle.

    granted_pages: of every instance, the pages of theirs there, also those that the prefix cache owns or that they borrowed.
    borrowed_here: pages of the own pool that they read of retained sequences, counted once per reader.
    retained: sequences whose request is over; their pages are in none of the other books.
    """

    def __init__(self, ids: PageIds) -> None:
        self.ids = ids
        self.requests: dict[int, HomeRequest] = {}
        self.retained = RetainedBook(ids.home)
        self.granted_pages: Counter[int] = Counter()
        self.borrowed_here = 0
        self._handle_of_page: dict[int, int] = {}
        self.closed_pages: set[int] = set()
        self._next_handle = 1

    def __len__(self) -> int:
        return len(self.requests)

    def open(self, born: int) -> HomeRequest:
        request = HomeRequest(self._next_handle, born)
        self._next_handle += 1
        self.requests[request.handle] = request
        return request

    def append(self, request: HomeRequest, page: Page) -> None:
        self._note(request, page)
        self._count(request, page.owner, 1)
        request.pages.append(page)
        self._index(request, len(request.pages) - 1, page)

    def adopt(self, request: HomeRequest, pages: Iterable[Page], num_tree_pages: int) -> None:
        """Takes over the pages of a request that was served locally so far."""
        request.pages = list(pages)
        request.num_tree_pages = num_tree_pages
        request.admitted = True
        for page_index, page in enumerate(request.pages):
            assert page is not None
            self._index(request, page_index, page)
            if page_index >= num_tree_pages:
                self._note(request, page)
        self._count(request, self.ids.home, len(request.pages))
        request.start_degree = len(request.shards)

    def expect(self, request: HomeRequest, grant: Grant) -> None:
        """Notes a grant: its pages are known by number once their shards have told."""
        for segment in grant.segments:
            end = segment.first_index + segment.num_pages
            if segment.first_index != len(request.pages):
                raise ValueError(f"handle {request.handle}: grant starts at page {segment.first_index}, {len(request.pages)} are there")
            request.num_missing += segment.num_pages
            self._count(request, segment.rank, segment.num_pages)
            request.pages += [None] * (end - len(request.pages))
        if not request.admitted:
            request.start_degree = len({*request.starts, *(segment.rank for segment in grant.segments)})
        request.admitted = True
        request.asked_admission = request.asked_growth = request.asked_stuck = False

    def fill(self, owner: int, granted: Granted) -> None:
        """Enters the page numbers that shard `owner` told. A handle released meanwhile is none of ours any more."""
        request = self.requests.get(granted.handle)
        if request is None:
            return
        for page_index, number in enumerate(granted.pages, granted.first_index):
            if request.pages[page_index] is not None:
                raise ValueError(f"handle {granted.handle}: page {page_index} arrived twice")
            page = Page(owner, number)
            self._note(request, page)
            request.pages[page_index] = page
            request.num_missing -= 1
            self._index(request, page_index, page)

    def close(self, handle: int) -> list[int]:
        """Forgets the request. Returns the numbers of its local pages that are ours to free."""
        return self._local(self._close(handle))

    def retain(self, handle: int, digests: bytes, num_pages: int) -> list[int]:
        """The request is over, its first pages stay. digests: of these (prefix_index.py). Returns the numbers of the local pages behind
        them. ValueError where the prefix cache owns some of its pages, none is its own, or some are not there."""
        request = self.requests[handle]
        kept = self._own_below(request, num_pages)
        self._close(handle)
        first = request.num_borrowed
        self.retained.put(handle, kept, digests[first * DIGEST_BYTES :], request.base, first)
        return self._local(request.pages[num_pages:])

    def take_over(self, request: HomeRequest, previous: int, num_kept: int) -> list[int]:
        """The request begins with the first pages of a retained sequence. Returns the numbers of the local pages behind them."""
        base, first = self.retained.borrowed(previous)
        pages = self.retained.pages(previous, self.retained.num_pages(previous))
        self.retained.take(previous)
        for page in pages[first:num_kept]:
            self._note(request, page)
        self._begin_with(request, pages[:num_kept], base, first)
        return self._local(pages[num_kept:])

    def borrow(self, request: HomeRequest, base: int, num_kept: int) -> None:
        """The request reads the first pages of a retained sequence."""
        self._begin_with(request, self.retained.pages(base, num_kept), base, num_kept)

    def share(self, request: HomeRequest, digests: bytes, num_pages: int) -> int:
        """The request's first pages, digests of which are given, become a retained sequence, which it reads from now on. Returns its
        handle. ValueError as for `retain`."""
        shared, first, handle = self._own_below(request, num_pages), request.num_borrowed, self._next_handle
        self._next_handle += 1
        for page in shared:
            del self._handle_of_page[self.ids.encode(page)]
        self.retained.put(handle, shared, digests[first * DIGEST_BYTES : num_pages * DIGEST_BYTES], request.base, first)
        self._end_reading(request)
        self._read(request, handle, num_pages)
        return handle

    def _own_below(self, request: HomeRequest, num_pages: int) -> list[Page]:
        pages = request.pages[request.num_borrowed : num_pages]
        if request.num_tree_pages or not pages or num_pages > len(request.pages) or None in pages:
            raise ValueError(f"handle {request.handle} cannot keep {num_pages} pages of {request.pages}, its own from {request.first_own}")
        return [page for page in pages if page is not None]

    def _begin_with(self, request: HomeRequest, pages: list[Page], base: int, num_borrowed: int) -> None:
        self.retained.unname(request.previous, request.handle)
        request.pages = list(pages)
        request.num_kept, request.previous = len(pages), 0
        for page_index, page in enumerate(pages):
            self._index(request, page_index, page)
        for owner, count in request.page_counts.items():
            self._count(request, owner, count)
        if base:
            self._read(request, base, num_borrowed)

    def _read(self, request: HomeRequest, base: int, num_pages: int) -> None:
        request.base, request.num_borrowed = base, num_pages
        self.retained.begin_reading(base, request.handle)
        self.borrowed_here += len(self._local(request.pages[:num_pages]))

    def _end_reading(self, request: HomeRequest) -> None:
        self.retained.end_reading(request.base, request.handle)
        self.borrowed_here -= len(self._local(request.pages[: request.num_borrowed]))

    def _close(self, handle: int) -> list[Page]:
        """Forgets the request, and returns its own pages."""
        request = self.requests.pop(handle)
        self.retained.unname(request.previous, handle)
        self._end_reading(request)
        self.granted_pages.subtract(request.granted_pages)
        own = [page for page in request.pages[request.first_own :] if page is not None]
        for page in own:
            page_id = self.ids.encode(page)
            del self._handle_of_page[page_id]
            self.closed_pages.add(page_id)
        return own

    def _local(self, pages: Iterable[Page | None]) -> list[int]:
        return [page.number for page in pages if page is not None and page.owner == self.ids.home]

    def handle_of(self, page_id: int) -> int | None:
        """The managed request that owns this page, as seen from home."""
        return self._handle_of_page.get(page_id)

    def closed_this_step(self, page_id: int) -> bool:
        """Whether the page went with a request that was closed since `forget_closed`.

        SGLang frees a row in two goes (the tokens that count, then those allocated beyond them); ours go whole with the first.
        """
        return page_id in self.closed_pages

    def forget_closed(self) -> None:
        """All rows are freed whole, and their pages may be given to others."""
        self.closed_pages.clear()

    def local_pages(self) -> Iterator[int]:
        """Numbers of the pages of the own pool that managed requests own."""
        for request in self.requests.values():
            for page in request.pages[request.first_own :]:
                if page is not None and page.owner == self.ids.home:
                    yield page.number

    def _count(self, request: HomeRequest, owner: int, num_pages: int) -> None:
        request.granted_pages[owner] = request.granted_pages.get(owner, 0) + num_pages
        self.granted_pages[owner] += num_pages

    def _index(self, request: HomeRequest, page_index: int, page: Page) -> None:
        request.route_at = (-1, None)
        request.starts[page.owner] = min(page_index, request.starts.get(page.owner, page_index))
        request.page_counts[page.owner] = request.page_counts.get(page.owner, 0) + 1
        if page.owner == self.ids.home:
            bisect.insort(request.own_pages, (page_index, page.number))

    def _note(self, request: HomeRequest, page: Page) -> None:
        page_id = self.ids.encode(page)
        if page_id in self._handle_of_page:
            raise ValueError(f"page {page} belongs to handle {self._handle_of_page[page_id]} already, not to {request.handle}")
        self._handle_of_page[page_id] = request.handle
