"""Which queries of a row see what a shard holds, and which of its keys: all before them, or in a window layer the last few.

Window K/V lie in the same pages as all other K/V, so a window layer differs in whom it asks and which keys are read, and in nothing
else. A *window* is SGLang's `sliding_window_size`: how many tokens before itself a token sees; None: all. A shard's pages ascend in the
sequence, and so do its keys: what a query sees of them is a run that ends with the last one before it.
"""

from __future__ import annotations

import numpy as np

from sglang_dcp.dataflow.contracts import AttentionRow


def queries_that_see(page_index: np.ndarray, num_new: int, prefix_len: int, page_size: int, window: int | None) -> int:
    """How many of a row's queries see a key on a shard that holds the pages `page_index` of its sequence: the first so many.

    A single query sees itself too; the queries of a chunk see each other at home, so on a shard only what is before the chunk. The home
    and the shard both call it: the former to know whom to ask, the latter how many queries come.
    """
    end = _end(num_new, prefix_len)
    num_pages = int(np.searchsorted(page_index, (end - 1) // page_size, side="right"))
    if not num_pages:
        return 0
    if window is None:
        return num_new
    last_position = min(end, (int(page_index[num_pages - 1]) + 1) * page_size) - 1
    return min(num_new, max(0, last_position + window - prefix_len + 1))


def pool_rows(
    num_new: int, prefix_len: int, page_index: np.ndarray, page_numbers: np.ndarray, page_size: int, window: int | None = None
) -> list[AttentionRow]:
    """Attention rows of the first `queries_that_see` queries over a shard's pool: one for all of them, or in a window layer one for each,
    over pages of one token, because each sees other keys."""
    count = queries_that_see(page_index, num_new, prefix_len, page_size, window)
    if not count:
        return []
    num_keys = keys_before(page_index, _end(num_new, prefix_len), page_size)
    if window is None:
        return [AttentionRow(num_new, page_numbers[: -(-num_keys // page_size)], page_size, num_keys)]
    rows = []
    for position in range(prefix_len, prefix_len + count):
        first = keys_before(page_index, max(0, position - window), page_size)
        places = np.arange(first, num_keys)
        slots = page_numbers[places // page_size] * page_size + places % page_size
        rows.append(AttentionRow(1, slots, page_size=1, num_keys=num_keys - first, window=window))
    return rows


def chunk_row(tokens: np.ndarray, window: int | None = None) -> AttentionRow:
    """The tokens of a chunk among each other, where they lie in the batch."""
    return AttentionRow(len(tokens), tokens, page_size=1, num_keys=len(tokens), causal=True, window=window)


def keys_before(page_index: np.ndarray, position: int, page_size: int) -> int:
    """Tokens at sequence positions below `position` on a shard that holds pages `page_index`: its pages are full, but for the last one."""
    last = (position - 1) // page_size
    num_pages = int(np.searchsorted(page_index, last, side="right"))
    cut = (last + 1) * page_size - position if num_pages and page_index[num_pages - 1] == last else 0
    return num_pages * page_size - cut


def _end(num_new: int, prefix_len: int) -> int:
    """Behind the last position that the row's queries look for on shards."""
    return prefix_len + 1 if num_new == 1 else prefix_len
