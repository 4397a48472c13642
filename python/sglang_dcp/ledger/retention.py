"""What an instance does about retained sequences: its own and those of others that have pages here.

A request that is over may leave its pages behind as a retained sequence. A later request of the same home that begins alike takes the
sequence over when it is granted what it needs beside it: not before, or requests that hold pages would wait for each other.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

from sglang_dcp.ledger.eviction import REASONS, Eviction
from sglang_dcp.ledger.guests import GuestBook
from sglang_dcp.ledger.homes import HomeBook, HomeRequest
from sglang_dcp.ledger.messages import Release, Retain
from sglang_dcp.ledger.prefix_index import least_pages
from sglang_dcp.ledger.reservations import Grant
from sglang_dcp.ledger.retained import RetainedTable


class Pool(Protocol):
    def return_pages(self, pages: list[int]) -> None: ...


@dataclass
class RetentionCounters:
    """Of this home's sequences. hits: requests that took one over. evictions: by reason."""

    hits: int = 0
    evictions: dict[str, int] = field(default_factory=lambda: dict.fromkeys(REASONS, 0))


@dataclass(frozen=True, slots=True)
class Match:
    """A retained sequence that begins like a prompt. num_pages: that agree. kept: (instance, pages) that the request would take over;
    pages behind the match are written anew."""

    handle: int
    num_pages: int
    kept: tuple[tuple[int, int], ...]

    @property
    def num_kept(self) -> int:
        return sum(pages for _, pages in self.kept)


class Retention:
    """lost: own waiting requests whose sequence was evicted: they must ask for all their pages."""

    def __init__(self, rank: int, homes: HomeBook, guests: GuestBook, pool: Pool, table: RetainedTable) -> None:
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
        return Retain(request.handle, retained.shards(request.handle, num_pages))

    def find(self, digests: bytes, most_pages: int, total_pages: int, degree: int | None = None) -> Match | None:
        """The sequence to take over for a prompt, None when none is worth it. digests: of the prompt's whole pages. At most `most_pages`
        of them may match; the request needs `total_pages` in all. degree: of the sequence, where it is pinned."""
        book = self.homes.retained
        for handle, common in book.matches(digests) if len(book) else ():
            num_pages, held = min(common, most_pages), book.num_pages(handle)
            kept = book.shards(handle, min(held, total_pages))
            fits = degree is None or len(kept) <= degree
            if fits and num_pages >= least_pages(held):
                return Match(handle, num_pages, kept)
        return None

    def name(self, request: HomeRequest, match: Match) -> None:
        """The request's ask, which must be sent, would take the sequence over: nobody else is offered it."""
        request.previous = match.handle
        self.homes.retained.names[match.handle] = request.handle

    def release_all(self) -> list[Release]:
        """Gives up every sequence of this home that no open ask names. The messages must be sent."""
        book = self.homes.retained
        handles = [handle for handle in book.handles() if handle not in book.names]
        for handle in handles:
            self.pool.return_pages(book.release(handle))
        return [Release(handle) for handle in handles]

    # ---- what every instance does in a step

    def take(self, home: int, message: Retain, step: int) -> None:
        """A home has told that a sequence stays."""
        self.table.put(home, message.handle, message.pages, step)
        if home != self.rank:
            self.pool.return_pages(self.guests.retain(home, message.handle, message.num_pages))

    def evict(self, evictions: Iterable[Eviction]) -> None:
        """Before the pages of the same step's grants are taken."""
        for home, handle, reason in evictions:
            if home != self.rank:
                self.pool.return_pages(self.guests.take_back(home, handle))
                continue
            book = self.homes.retained
            request = self.homes.requests.get(book.names.get(handle, 0))
            if request is not None:
                request.previous = 0
                self.lost.append(request)
            self.pool.return_pages(book.release(handle))
            self.counters.evictions[REASONS[reason]] += 1

    def take_over(self, grant: Grant) -> None:
        """The pages of the sequence that a grant names become the request's. One that has been released since gives them up with its
        `Release`, as all that it was granted."""
        if not grant.previous:
            return
        if grant.home != self.rank:
            self.pool.return_pages(self.guests.take_over(grant.home, grant.previous, grant.handle, grant.num_kept))
            return
        request = self.homes.requests.get(grant.handle)
        if request is None:
            self.pool.return_pages(self.homes.retained.release(grant.previous))
            return
        self.pool.return_pages(self.homes.take_over(request, grant.previous, grant.num_kept))
        self.counters.hits += 1
