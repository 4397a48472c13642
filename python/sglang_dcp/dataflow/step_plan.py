"""Builds the plan of one step from rows: who sends which query where, who writes which K/V, what is attended, what is merged.

Sender and receiver build their halves from the same facts (page owners, prefix lengths), so nothing is negotiated: a home row goes to
every instance that holds a page of it which begins before the row's end.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from sglang_dcp.dataflow.contracts import AttentionRow, GuestRow, HomeRow, StepPlan


def build_step_plan(
    step: int,
    rank: int,
    num_instances: int,
    page_size: int,
    num_tokens: int,
    home_rows: Sequence[HomeRow],
    guest_rows: Sequence[GuestRow],
) -> StepPlan:
    """Plan of instance `rank`.

    num_tokens: tokens of the own batch (padding included); home_rows in batch order; guest_rows ordered by home, then by that home's batch.
    """
    sending = _Sending(rank, num_instances)
    attention = []
    for row in home_rows:
        sending.add(row, page_size)
        mine = np.flatnonzero(row.page_owners == rank)
        attention.append(attention_row(row.token_start, row.num_new, row.prefix_len, mine, row.page_numbers[mine], page_size))
    receive_queries, receive_kv = [0] * num_instances, [0] * num_instances
    receive_slots = []
    query_start = num_tokens
    for guest in guest_rows:
        slots = _written_slots(guest, page_size)
        receive_queries[guest.home] += guest.num_new
        receive_kv[guest.home] += len(slots)
        receive_slots.append(slots)
        attention.append(attention_row(query_start, guest.num_new, guest.prefix_len, guest.page_index, guest.page_numbers, page_size))
        query_start += guest.num_new
    send_queries = [_concat(parts) for parts in sending.queries]
    send_kv = [_concat(parts) for parts in sending.kv]
    depths = _merge_depths(send_queries, num_tokens)
    return StepPlan(
        step=step,
        num_tokens=num_tokens,
        send_queries=torch.from_numpy(_concat(send_queries)),
        send_query_splits=tuple(len(sent) for sent in send_queries),
        receive_query_splits=tuple(receive_queries),
        send_kv=torch.from_numpy(_concat(send_kv)),
        send_kv_splits=tuple(len(sent) for sent in send_kv),
        receive_kv_splits=tuple(receive_kv),
        receive_kv_slots=torch.from_numpy(_concat(receive_slots)),
        write_tokens=torch.from_numpy(_concat(sending.write_tokens)),
        write_slots=torch.from_numpy(_concat(sending.write_slots)),
        attention_rows=tuple(row for row in attention if row.num_queries),
        merge_depth=torch.from_numpy(depths),
        num_partials=1 + int(depths.max(initial=0)),
        num_guest_rows=len(guest_rows),
    )


class _Sending:
    """What an instance's own rows send, per destination, and what of their K/V stays."""

    def __init__(self, rank: int, num_instances: int) -> None:
        self._rank = rank
        self.queries: list[list[np.ndarray]] = [[] for _ in range(num_instances)]
        self.kv: list[list[np.ndarray]] = [[] for _ in range(num_instances)]
        self.write_tokens: list[np.ndarray] = []
        self.write_slots: list[np.ndarray] = []

    def add(self, row: HomeRow, page_size: int) -> None:
        if row.num_new == 1:
            self._add_decode(row, page_size)
            return
        tokens = np.arange(row.token_start, row.token_start + row.num_new)
        positions = np.arange(row.prefix_len, row.prefix_len + row.num_new)
        owners = row.page_owners[positions // page_size]
        for owner in _active_owners(row, page_size):
            if owner != self._rank:
                self.queries[owner].append(tokens)
                self.kv[owner].append(tokens[owners == owner])
        here = owners == self._rank
        self.write_tokens.append(tokens[here])
        self.write_slots.append(row.page_numbers[positions[here] // page_size] * page_size + positions[here] % page_size)

    def _add_decode(self, row: HomeRow, page_size: int) -> None:
        """The same for one token. Most rows of most steps are such, and lie at home: no array is made for them."""
        token = np.array([row.token_start])
        page, offset = divmod(row.prefix_len, page_size)
        tail = int(row.page_owners[page])
        if bool((row.page_owners[: page + 1] != self._rank).any()):
            for owner in _active_owners(row, page_size):
                if owner != self._rank:
                    self.queries[owner].append(token)
                    self.kv[owner].append(token if owner == tail else token[:0])
        if tail == self._rank:
            self.write_tokens.append(token)
            self.write_slots.append(np.array([row.page_numbers[page] * page_size + offset]))


def _merge_depths(send_queries: Sequence[np.ndarray], num_tokens: int) -> np.ndarray:
    """For each query row sent: 1 for the token's first remote partial, 2 for its second ..."""
    depth_of_token = np.zeros(num_tokens, dtype=np.int64)
    depths = []
    for sent in send_queries:
        depth_of_token[sent] += 1
        depths.append(depth_of_token[sent].copy())
    return _concat(depths)


def attention_row(
    query_start: int, num_queries: int, prefix_len: int, page_index: np.ndarray, page_numbers: np.ndarray, page_size: int
) -> AttentionRow:
    """The (request, shard) pair whose shard holds pages `page_numbers` at sequence indices `page_index` (ascending)."""
    end = prefix_len + num_queries
    num_keys = _keys_before(page_index, end, page_size)
    num_unmasked = num_keys if num_queries == 1 else _keys_before(page_index, prefix_len, page_size)
    return AttentionRow(
        query_start=query_start,
        num_queries=num_queries,
        page_numbers=page_numbers[: -(-num_keys // page_size)],
        page_size=page_size,
        num_keys=num_keys,
        num_unmasked=num_unmasked,
        key_offsets=torch.from_numpy(_chunk_offsets(page_index, prefix_len, end, page_size)[: num_keys - num_unmasked]),
    )


def _keys_before(page_index: np.ndarray, position: int, page_size: int) -> int:
    """Tokens at sequence positions below `position` on a shard that holds pages `page_index`: its pages are full, but for the last one."""
    last = (position - 1) // page_size
    num_pages = int(np.searchsorted(page_index, last, side="right"))
    cut = (last + 1) * page_size - position if num_pages and page_index[num_pages - 1] == last else 0
    return num_pages * page_size - cut


def _chunk_offsets(page_index: np.ndarray, prefix_len: int, end: int, page_size: int) -> np.ndarray:
    """Positions of a chunk's own tokens that lie on the shard, relative to its first; ascending. Nothing for a single token."""
    if end - prefix_len == 1:
        return np.zeros(0, dtype=np.int64)
    pages = page_index[np.searchsorted(page_index, prefix_len // page_size) :]
    positions = (pages[:, None] * page_size + np.arange(page_size)).ravel()
    return (positions[(positions >= prefix_len) & (positions < end)] - prefix_len).astype(np.int64)


def holds_active_page(first_page_index: int, page_size: int, sequence_len: int) -> bool:
    """Whether a shard takes part: its first page begins before the sequence's end."""
    return first_page_index * page_size < sequence_len


def _active_owners(row: HomeRow, page_size: int) -> list[int]:
    num_pages = -(-(row.prefix_len + row.num_new) // page_size)
    return [int(owner) for owner in np.unique(row.page_owners[:num_pages])]


def _written_slots(guest: GuestRow, page_size: int) -> np.ndarray:
    positions = np.arange(guest.prefix_len, guest.prefix_len + guest.num_new)
    where = np.searchsorted(guest.page_index, positions // page_size)
    found = where < len(guest.page_index)
    found[found] = guest.page_index[where[found]] == positions[found] // page_size
    return guest.page_numbers[where[found]] * page_size + positions[found] % page_size


def _concat(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.asarray(part, dtype=np.int64) for part in parts]) if parts else np.zeros(0, dtype=np.int64)
