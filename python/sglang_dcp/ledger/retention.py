"""What an instance does about retained sequences: its own and those of others that have pages here.

A request that is over may leave its pages behind as a retained sequence. A later request of the same home that begins alike takes the
sequence over when it is granted what it needs beside it: not before, or requests that hold pages would wait for each other. Where others
read the sequence, or the request that has the pages still runs, it borrows them instead.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from sglang_dcp.ledger.eviction import REASONS, Eviction
from sglang_dcp.ledger.guests import GuestBook
from sglang_dcp.ledger.homes import HomeBook, HomeRequest
from sglang_dcp.ledger.messages import Release, Retain, Share
from sglang_dcp.ledger.page_pool import PagePool
from sglang_dcp.ledger.prefix_index import least_pages
from sglang_dcp.ledger.reservations import Grant
from sglang_dcp.ledger.retained import RetainedTable


@dataclass
class RetentionCounters:
    """Of this home's sequences. hits: requests that took one over or borrowed one; borrows: the latter. evictions: by reason."""

    hits: int = 0
    borrows: int = 0
    evictions: dict[str, int] = field(default_factory=lambda: dict.fromkeys(REASONS, 0))


@dataclass(frozen=True, slots=True)
class Match:
    """A retained sequence that begins like a prompt. num_pages: that agree. kept: (instance, pages) that the request would take over;
    pages behind the match are written anew. borrows: it would read them instead, and no more than agree."""

    handle: int
    num_pages: int
    kept: tuple[tuple[int, int], ...]
    borrows: bool = False

    @property
    def num_kept(self) -> int:
        return sum(pages for _, pages in self.kept)


class Retention:
    """lost: own waiting requests whose sequence was evicted: they must ask for all their pages."""

    def __init__(self, rank: int, homes: HomeBook, guests: GuestBook, pool: PagePool, table: RetainedTable) -> None:
        self.rank, self.homes, self.guests, self.pool, self.table = rank, homes, guests, pool, table
        self.counters = RetentionCounters()
        self.lost: list[HomeRequest] = []

    @property
    def num_pages_here(self) -> int:
        """Retained pages in the own pool."""
        return self.guests.num_retained + self.homes.retained.num_local_pages

    # ---- what a home does

    def finish(self, request: HomeRequest, digests: bytes, num_pages: int) -> Retain:
        """The request is over, its first pages stay. digests: of these. The message must be sent."""
        retained = self.homes.retained
        self.pool.return_pages(self.homes.retain(request.handle, digests, num_pages))
        return Retain(request.handle, retained.own_shards(request.handle))

    def share(self, request: HomeRequest, digests: bytes, num_pages: int) -> Share:
        """The first pages of a running request can be read by others. digests: of these. The message must be sent."""
        base = self.homes.share(request, digests, num_pages)
        return Share(request.handle, base, self.homes.retained.own_shards(base))

    def find(self, digests: bytes, most_pages: int, total_pages: int, degree: int | None = None) -> Match | None:
        """The sequence to go on from for a prompt, None when none is worth it. digests: of the prompt's whole pages. At most `most_pages`
        of them may match; the request needs `total_pages` in all. degree: of the sequence, where it is pinned."""
        book = self.homes.retained
        for handle, common in book.matches(digests) if len(book) else ():
            num_pages, held, borrows = min(common, most_pages), book.num_pages(handle), book.is_shared(handle)
            kept = book.shards(handle, num_pages if borrows else min(held, total_pages))
            fits = degree is None or len(kept) <= degree
            if fits and num_pages >= least_pages(held) and num_pages > book.borrowed(handle)[1]:
                return Match(handle, num_pages, kept, borrows)
        return None

    def name(self, request: HomeRequest, match: Match) -> None:
        """The request's ask, which must be sent, would go on from the sequence. One that is to be taken over is offered to nobody else."""
        request.previous = match.handle
        self.homes.retained.name(match.handle, request.handle, takes=not match.borrows)

    def release_all(self) -> list[Release]:
        """Gives up every sequence of this home that no open ask names and nobody reads. The messages must be sent."""
        book, released = self.homes.retained, []
        for handle in reversed(book.handles()):  # readers come after what they read
            if not book.is_shared(handle):
                self.pool.return_pages(book.release(handle))
                released.append(Release(handle))
        return released

    # ---- what every instance does in a step

    def take(self, home: int, message: Retain, step: int) -> None:
        """A home has told that a sequence stays."""
        self.table.put(home, message.handle, message.pages, step)
        if home != self.rank:
            self.pool.return_pages(self.guests.retain(home, message.handle, message.num_pages))

    def take_shared(self, home: int, message: Share, step: int) -> None:
        """A home has told that others may read what its request has."""
        self.table.share(home, message.handle, message.base, message.pages, step)
        if home != self.rank:
            self.guests.share(home, message.handle, message.base, message.num_pages)

    def evict(self, evictions: Iterable[Eviction]) -> None:
        """Before the pages of the same step's grants are taken."""
        for home, handle, reason in evictions:
            if home != self.rank:
                self.pool.return_pages(self.guests.take_back(home, handle))
                continue
            book = self.homes.retained
            for waiting in sorted(book.names.get(handle, ())):
                request = self.homes.requests[waiting]
                request.previous = 0
                self.lost.append(request)
            self.pool.return_pages(book.release(handle))
            self.counters.evictions[REASONS[reason]] += 1

    def begin(self, grant: Grant) -> None:
        """The pages of the sequence that a grant names become the request's, or it reads them. One that has been released since gives up
        what it was granted with its `Release`."""
        if grant.previous:
            (self._borrow if grant.borrows else self._take_over)(grant, self.homes.requests.get(grant.handle))

    def _take_over(self, grant: Grant, request: HomeRequest | None) -> None:
        if grant.home != self.rank:
            self.pool.return_pages(self.guests.take_over(grant.home, grant.previous, grant.handle, grant.num_kept))
        elif request is None:
            self.pool.return_pages(self.homes.retained.release(grant.previous))
        else:
            self.pool.return_pages(self.homes.take_over(request, grant.previous, grant.num_kept))
            self.counters.hits += 1

    def _borrow(self, grant: Grant, request: HomeRequest | None) -> None:
        if grant.home != self.rank:
            self.guests.borrow(grant.home, grant.previous, grant.handle, grant.num_kept)
        elif request is not None:
            self.homes.borrow(request, grant.previous, grant.num_kept)
            self.counters.hits += 1
            self.counters.borrows += 1
