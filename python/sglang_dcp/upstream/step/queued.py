"""Where SGLang keeps requests that do not run: one queue, or, on a decode server behind prefill servers, three of another meaning.

There a request waits for its pages in the preallocation queue, for its K/V in the transfer queue, and with both in the waiting queue. One
that was aborted in mid-transfer holds its pages until the prefill server has stopped writing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast


def behind_prefill_servers(scheduler: Any) -> bool:
    return getattr(scheduler, "disagg_decode_prealloc_queue", None) is not None


def without_pages(scheduler: Any) -> Sequence[Any]:
    """Requests that wait and hold no page of SGLang's. Not to be changed: it may be SGLang's own list."""
    if not behind_prefill_servers(scheduler):
        return cast(Sequence[Any], scheduler.waiting_queue)
    return [entry.req for entry in scheduler.disagg_decode_prealloc_queue.queue]


def with_pages(scheduler: Any) -> list[Any]:
    """Requests that hold a row and its pages before they run. None but on a decode server."""
    if not behind_prefill_servers(scheduler):
        return []
    transfers = scheduler.disagg_decode_transfer_queue
    arriving = [entry.req for entry in transfers.queue] + [held[0].req for held in transfers._deferred_releases]
    return [*arriving, *scheduler.waiting_queue]


def is_without_pages(scheduler: Any, req: Any) -> bool:
    return any(waiting is req for waiting in without_pages(scheduler))


def num_rows_in_use(rows: Any) -> int:
    """rows: SGLang's request pool; a decode server's has room for requests in transfer beside its size."""
    return int(rows.size + getattr(rows, "pre_alloc_size", 0) - rows.available_size())
