"""Builds the plan of one step from rows: who sends which query where, who writes which K/V, what is attended where.

Sender and receiver build their halves from the same facts (page owners, prefix lengths), so nothing is negotiated. A query goes to every
instance that holds a page with tokens which the row's home cannot attend itself: those before a chunk, or for a single token all. A new
token's K/V goes to the owner of its page. Nothing leaves the exchange group (Layout.group).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from sglang_dcp.dataflow.contracts import AttentionRow, GuestRow, HomeRow, MergeList, StepPlan, TokenList
from sglang_dcp.dataflow.window import chunk_row, pool_rows, queries_that_see


def build_step_plan(
    step: int,
    rank: int,
    group: range,
    page_size: int,
    num_tokens: int,
    home_rows: Sequence[HomeRow],
    guest_rows: Sequence[GuestRow],
    window: int | None = None,
) -> StepPlan:
    """Plan of instance `rank` of `group`. ValueError for a page of a home row that lies outside the group.

    num_tokens: tokens of the own batch (padding included); home_rows in batch order; guest_rows ordered by home, then by that home's batch.
    window: of the layers that the plan is for (window.py).
    """
    sending = _Sending(rank, group, num_tokens, window)
    attended, pool_tokens, chunk_rows, chunk_tokens = [], [], [], []
    for row in home_rows:
        sending.add(row, page_size)
        tokens = np.arange(row.token_start, row.token_start + row.num_new)
        mine = np.flatnonzero(row.page_owners == rank)
        held = pool_rows(row.num_new, row.prefix_len, mine, row.page_numbers[mine], page_size, window)
        attended += held
        pool_tokens.append(tokens[: _num_queries(held)])
        if row.num_new > 1:
            chunk_rows.append(chunk_row(tokens, window))
            chunk_tokens.append(tokens)
    receive_queries = [0] * len(group)
    receive_slots: list[list[np.ndarray]] = [[] for _ in group]
    for guest in guest_rows:
        home = group.index(guest.home)
        receive_slots[home].append(_written_slots(guest, page_size))
        held = pool_rows(guest.num_new, guest.prefix_len, guest.page_index, guest.page_numbers, page_size, window)
        receive_queries[home] += _num_queries(held)
        attended += held
    asked, held_tokens = [_concat(parts) for parts in sending.queries], _concat(pool_tokens)
    return StepPlan(
        step=step,
        num_tokens=num_tokens,
        send_queries=tuple(map(TokenList.of, asked)),
        receive_query_splits=tuple(receive_queries),
        send_kv=tuple(TokenList.of(_concat(parts)) for parts in sending.kv),
        receive_kv_slots=tuple(torch.from_numpy(_concat(parts)) for parts in receive_slots),
        write_slots=torch.from_numpy(sending.write_slots),
        pool_rows=tuple(attended),
        pool_tokens=TokenList.of(held_tokens),
        chunk_rows=tuple(chunk_rows),
        chunk_tokens=TokenList.of(_concat(chunk_tokens)),
        merges=merge_list(num_tokens, held_tokens, asked),
    )


def merge_list(num_tokens: int, pool_tokens: np.ndarray, asked: Sequence[np.ndarray]) -> MergeList:
    """Where the partials of the own tokens come together. asked[i]: tokens whose partials instance i returns, in that order."""
    returning = _concat(asked)
    pool_rows = np.full(num_tokens, -1, dtype=np.int64)
    pool_rows[pool_tokens] = np.arange(len(pool_tokens))
    counts = np.bincount(returning, minlength=num_tokens)
    tokens = np.flatnonzero((pool_rows >= 0) | (counts > 0))
    begins = np.concatenate([[0], counts[tokens].cumsum()])
    # A stable order by token leaves a token's rows in the order of their shards.
    lists = tokens, pool_rows[tokens], begins, np.argsort(returning, kind="stable")
    return MergeList(*(torch.from_numpy(part.astype(np.int64, copy=False)) for part in lists))


def asks(num_new: int, prefix_len: int) -> bool:
    """Whether a row with remote shards may send queries. A first chunk never does."""
    return num_new == 1 or prefix_len > 0


class _Sending:
    """What an instance's own rows send, per destination, and what of their K/V stays."""

    def __init__(self, rank: int, group: range, num_tokens: int, window: int | None) -> None:
        self._rank, self._group, self._window = rank, group, window
        self.queries: list[list[np.ndarray]] = [[] for _ in group]
        self.kv: list[list[np.ndarray]] = [[] for _ in group]
        self.write_slots = np.zeros(num_tokens, dtype=np.int64)

    def add(self, row: HomeRow, page_size: int) -> None:
        if row.num_new == 1:
            self._add_decode(row, page_size)
            return
        tokens = np.arange(row.token_start, row.token_start + row.num_new)
        positions = np.arange(row.prefix_len, row.prefix_len + row.num_new)
        self._ask(row, tokens, _owners_before(row, row.prefix_len, page_size), page_size)
        pages = positions // page_size
        owners = row.page_owners[pages]
        for owner in np.unique(owners).tolist():
            if owner != self._rank:
                self.kv[self._group.index(owner)].append(tokens[owners == owner])
        here = owners == self._rank
        self.write_slots[tokens[here]] = row.page_numbers[pages[here]] * page_size + positions[here] % page_size

    def _add_decode(self, row: HomeRow, page_size: int) -> None:
        """The same for one token. Most rows of most steps are such, and lie at home: no array is made for them."""
        page, offset = divmod(row.prefix_len, page_size)
        tail = int(row.page_owners[page])
        if tail == self._rank:
            self.write_slots[row.token_start] = row.page_numbers[page] * page_size + offset
        if not bool((row.page_owners[: page + 1] != self._rank).any()):
            return
        token = np.array([row.token_start])
        self._ask(row, token, _owners_before(row, row.prefix_len + 1, page_size), page_size)
        if tail != self._rank:
            self.kv[self._group.index(tail)].append(token)

    def _ask(self, row: HomeRow, tokens: np.ndarray, owners: Sequence[int], page_size: int) -> None:
        """owners: who holds tokens that a query may look for. In a window layer it looks for the last few alone."""
        for owner in owners:
            if owner == self._rank:
                continue
            place, asking = self._group.index(owner), tokens
            if self._window is not None:
                pages = np.flatnonzero(row.page_owners == owner)
                asking = tokens[: queries_that_see(pages, row.num_new, row.prefix_len, page_size, self._window)]
            self.queries[place].append(asking)


def holds_active_page(first_page_index: int, page_size: int, sequence_len: int) -> bool:
    """Whether a shard takes part: its first page begins before the sequence's end."""
    return first_page_index * page_size < sequence_len


def _num_queries(rows: Sequence[AttentionRow]) -> int:
    return sum(row.num_queries for row in rows)


def _owners_before(row: HomeRow, position: int, page_size: int) -> list[int]:
    """Who holds tokens below `position`."""
    return [int(owner) for owner in np.unique(row.page_owners[: -(-position // page_size)])]


def _written_slots(guest: GuestRow, page_size: int) -> np.ndarray:
    positions = np.arange(guest.prefix_len, guest.prefix_len + guest.num_new)
    where = np.searchsorted(guest.page_index, positions // page_size)
    found = where < len(guest.page_index)
    found[found] = guest.page_index[where[found]] == positions[found] // page_size
    return guest.page_numbers[where[found]] * page_size + positions[found] % page_size


def _concat(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.asarray(part, dtype=np.int64) for part in parts]) if parts else np.zeros(0, dtype=np.int64)
