"""Faults of retained sequences, for mutants.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from sglang_dcp.ledger.guests import GuestBook
from sglang_dcp.ledger.participant import Participant
from sglang_dcp.ledger.readers import Readers
from sglang_dcp.ledger.retained import RetainedTable
from sglang_dcp.ledger.retention import Match, Retention


def _set(owner: Any, name: str, value: Any) -> None:
    setattr(owner, name, value)


def _evict_where_known(retention: Any, evictions: Any) -> None:
    """As Retention.evict, but a home passes over what it does not know to be retained."""
    for eviction in evictions:
        if eviction.home != retention.rank:
            retention.pool.return_pages(retention.guests.take_back(eviction.home, eviction.handle))
        elif eviction.handle in retention.homes.retained:
            retention.pool.return_pages(retention.homes.retained.release(eviction.handle))


def _evicted_taken_over() -> None:
    """Pages of an evicted sequence are free, and it is offered as before."""

    def evict(retention: Any, evictions: Any) -> None:
        for eviction in evictions:
            book = retention.homes.retained
            if eviction.home != retention.rank:
                retention.pool.return_pages(retention.guests.take_back(eviction.home, eviction.handle))
            elif eviction.handle in book:
                retention.pool.return_pages([number for _, number in book.pages_on(eviction.handle, retention.rank)])

    _set(Retention, "evict", evict)


def _live_handle_evicted() -> None:
    """A sequence that was taken over can still be evicted, under its new handle."""
    begin = Retention.begin

    def broken(retention: Any, grant: Any) -> None:
        begin(retention, grant)
        if grant.previous and (grant.home, grant.handle) not in retention.table:
            retention.table.put(grant.home, grant.handle, [(rank, 1) for rank in range(len(retention.table.pages))], 0)

    _set(Retention, "begin", broken)
    _set(Retention, "evict", _evict_where_known)


def _partial_page_kept() -> None:
    """The page in which a prompt leaves a sequence counts as common."""
    find = Retention.find

    def broken(retention: Any, *args: Any) -> Match | None:
        match = find(retention, *args)
        if match is None or match.num_pages >= min(match.num_kept, args[1]):
            return match
        return dataclasses.replace(match, num_pages=match.num_pages + 1)

    _set(Retention, "find", broken)


def _retained_counted_as_free() -> None:
    """An instance tells that it can give pages that are retained."""
    build = Participant.build_columns

    def broken(participant: Any, rows: Any, free_pages: int, *args: Any) -> list[int]:
        return build(participant, rows, free_pages + participant.retention.num_pages_here, *args)

    _set(Participant, "build_columns", broken)


def _read_pages_evicted() -> None:
    """What a running request reads of a retained sequence may be evicted."""
    _set(Readers, "is_read_by_running", lambda _readers, _key: False)
    _set(Readers, "go", lambda readers, key: readers._base.pop(key, None))
    _set(RetainedTable, "_free", lambda _table, _keys, _sign: None)
    _set(Retention, "evict", _evict_where_known)


def _reader_frees_what_it_reads() -> None:
    """A shard takes a reader's borrowed pages for its own."""
    _set(GuestBook, "_own", lambda _book, entries, _home, _handle: entries)


RETAINED_MUTANTS: dict[str, Callable[[], None]] = {
    "evicted-taken-over": _evicted_taken_over,
    "live-handle-evicted": _live_handle_evicted,
    "partial-page-kept": _partial_page_kept,
    "retained-counted-as-free": _retained_counted_as_free,
    "read-pages-evicted": _read_pages_evicted,
    "reader-frees-what-it-reads": _reader_frees_what_it_reads,
}
