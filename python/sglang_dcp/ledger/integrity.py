"""Every page has one owner at all times: the check that says so, per instance and across the cluster."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from sglang_dcp.ledger.guests import GuestBook
from sglang_dcp.ledger.homes import HomeBook


class IntegrityError(AssertionError):
    """A page with no owner, or with two."""


def check_instance(num_pages: int, owners: Mapping[str, Iterable[int]], *, complete: bool = True) -> None:
    """Checks that pages 1..num_pages of one pool are split among `owners` (name -> page numbers) without overlap.

    With `complete`, no page may be missing. Raises IntegrityError that names page and owners.
    """
    seen: dict[int, str] = {}
    for name, pages in owners.items():
        for page in pages:
            if not 1 <= page <= num_pages:
                raise IntegrityError(f"{name} holds page {page}, outside 1..{num_pages}")
            if page in seen:
                raise IntegrityError(f"page {page} belongs to {seen[page]} and to {name}")
            seen[page] = name
    if complete and len(seen) != num_pages:
        lost = sorted(set(range(1, num_pages + 1)) - set(seen))
        raise IntegrityError(f"{len(lost)} pages have no owner, first {lost[:8]}")


def check_cluster(homes: Mapping[int, HomeBook], guests: Mapping[int, GuestBook]) -> None:
    """Checks that what homes believe to hold elsewhere is what the shards have lent. Only between steps, with no message in flight."""
    for home, book in homes.items():
        for request in book.requests.values():
            for rank, guest_book in guests.items():
                if rank == home:
                    continue
                believed = [(i, p.number) for i, p in enumerate(request.pages) if p is not None and p.owner == rank]
                lent = list(guest_book.pages_of(home, request.handle))
                if believed != lent:
                    raise IntegrityError(f"home {home}, handle {request.handle}: believes {believed} on {rank}, which lent {lent}")
        _check_retained(home, book, guests)
    for rank, guest_book in guests.items():
        for home, handle in guest_book.handles():
            if handle not in homes[home].requests:
                raise IntegrityError(f"instance {rank} hosts handle {handle} of home {home}, which does not know it")
        for home, handle in guest_book.retained_handles():
            if handle not in homes[home].retained:
                raise IntegrityError(f"instance {rank} retains handle {handle} of home {home}, which does not")


def _check_retained(home: int, book: HomeBook, guests: Mapping[int, GuestBook]) -> None:
    for handle in book.retained.handles():
        for rank, guest_book in guests.items():
            believed = book.retained.pages_on(handle, rank)
            held = guest_book.retained_pages_of(home, handle)
            if rank != home and believed != held:
                raise IntegrityError(f"home {home}, handle {handle}: believes {believed} retained on {rank}, which holds {held}")
