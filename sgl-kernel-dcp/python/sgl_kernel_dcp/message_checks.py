"""What the kernels rely on in a step's message. ValueError names the value and its limit."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from sgl_kernel_dcp.shapes import TableShape

ROUTE_TAIL_SHIFT = 16


def check_limit(name: str, value: int, limit: int) -> None:
    if value > limit:
        raise ValueError(f"{name} is {value}, the limit of these buffers is {limit}")


def check_words(home: int, words: Iterable[int], num_instances: int) -> None:
    """words: of the home's rows, each once; there are few different ones."""
    for word in words:
        mask, tail = word & (1 << ROUTE_TAIL_SHIFT) - 1, (word >> ROUTE_TAIL_SHIFT) - 1
        if mask >> num_instances:
            raise ValueError(f"home {home} routes to an instance beyond {num_instances - 1}")
        if tail >= 0 and (tail == home or not mask >> tail & 1):
            raise ValueError(f"home {home}: K/V travels to {tail}, which must be a remote shard of its row")


def check_rows(rows: np.ndarray, shape: TableShape, num_entries: int, expects: bytes) -> None:
    """rows int32 [n, 4]. expects: a byte per row, 1 where K/V arrives for it."""
    check_limit("arriving K/V rows (max_kv_rows)", expects.count(1), shape.max_kv_rows)
    if not len(rows):
        return
    kv_slots = rows[:, 3]
    if (kv_slots >= 0).tobytes() != expects:
        row = int(((kv_slots >= 0) != np.frombuffer(expects, dtype=bool)).argmax())
        arrives = "arrives" if expects[row] else "does not arrive"
        raise ValueError(f"attention row {row}: kv_slot {int(kv_slots[row])}, but K/V {arrives}")
    # One question for all, as each costs some microseconds: what is negative is beyond everything without its sign.
    entry, tokens, _, _ = np.maximum.reduce(rows.view(np.uint32), axis=0).tolist()
    most = -(-tokens // shape.page_size)
    if entry >= num_entries or most > shape.max_pages_per_row or most * len(rows) > shape.max_pages:
        _check_each(rows[:, 0], rows[:, 1], shape, num_entries)


def _check_each(entries: np.ndarray, tokens: np.ndarray, shape: TableShape, num_entries: int) -> None:
    wrong = (tokens < 0) | ((tokens > 0) & ((entries < 0) | (entries >= num_entries)))
    if wrong.any():
        row = int(wrong.argmax())
        raise ValueError(
            f"attention row {row}: entry {int(entries[row])} with {int(tokens[row])} tokens, entries are 0 to {num_entries - 1}"
        )
    pages = -(-tokens // shape.page_size)
    check_limit("pages of all rows (max_pages)", int(pages.sum()), shape.max_pages)
    check_limit("pages of one row (max_pages_per_row)", int(pages.max(initial=0)), shape.max_pages_per_row)
