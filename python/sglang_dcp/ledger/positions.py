"""Where the tokens of a managed request lie, as its home sees it: token ids, and the routes of its rows."""

from __future__ import annotations

import numpy as np

from sglang_dcp.ledger.homes import HomeRequest
from sglang_dcp.ledger.page_ids import PageIds
from sglang_dcp.ledger.routes import route_word


class PositionError(RuntimeError):
    """A row or a token id was asked for whose page the home does not know (yet). That is a defect of ours: the process ends."""


def token_ids(ids: PageIds, request: HomeRequest, start: int, stop: int) -> np.ndarray:
    """Token ids (as in req_to_token) of positions start .. stop - 1."""
    page_size = ids.page_size
    positions = np.arange(start, stop)
    first, last = start // page_size, (stop - 1) // page_size
    pages = request.pages[first : last + 1]
    if None in pages or len(pages) != last + 1 - first:
        raise PositionError(f"handle {request.handle}: positions {start}..{stop - 1} need page {last}, {len(request.pages)} are there")
    page_ids = np.array([ids.encode(page) for page in pages if page is not None])
    return page_ids[positions // page_size - first] * page_size + positions % page_size


def token_id(ids: PageIds, request: HomeRequest, position: int) -> int:
    """The same for one position, without an array."""
    index, offset = divmod(position, ids.page_size)
    page = request.pages[index] if index < len(request.pages) else None
    if page is None:
        raise PositionError(f"handle {request.handle}: position {position} needs page {index}, {len(request.pages)} are there")
    return ids.encode(page) * ids.page_size + offset


def route_of(ids: PageIds, request: HomeRequest, sequence_len: int, group: range) -> int | None:
    """The route of a row that ends at sequence_len; None where no remote instance takes part in it. group: the home's exchange group.

    All rows that end on the same page have the same, for as long as no page is added.
    """
    index = (sequence_len - 1) // ids.page_size
    known = request.route_at
    if known[0] == index:
        return known[1]
    route = _find_route(ids, request, sequence_len, group)
    request.route_at = index, route
    return route


def _find_route(ids: PageIds, request: HomeRequest, sequence_len: int, group: range) -> int | None:
    shards = request.active_shards(sequence_len, ids.page_size)
    if all(owner == ids.home for owner in shards):
        return None
    tail = request.pages[(sequence_len - 1) // ids.page_size]
    if tail is None:
        raise PositionError(f"handle {request.handle}: a row of {sequence_len} tokens runs before the page of its last one is known")
    return route_word(request.active_shards(sequence_len, ids.page_size), tail.owner, ids.home, group)


def keeps_route(ids: PageIds, request: HomeRequest, sequence_len: int) -> bool:
    """Whether a row that ends at sequence_len, the first token of a page, has the route of the row before it.

    Its tail stays then; and a shard comes in with its first page only.
    """
    index = (sequence_len - 1) // ids.page_size
    before, tail = request.pages[index - 1] if index else None, request.pages[index]
    return before is not None and tail is not None and before.owner == tail.owner
