"""Routes as the kernels read them, and what follows from them alone. Every instance knows those of every sharded row, so both ends of an
exchange lay out their slots from the same facts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from sglang_dcp.ledger.routes import shard_mask, travelling_tail

TAIL_SHIFT = 16  # sgl_kernel_dcp.tables.ROUTE_TAIL_SHIFT; a test holds the two together


def route_word32(route: int) -> int:
    """A route as the kernels read it: a bit per shard, the travelling tail + 1 above."""
    return shard_mask(route) | travelling_tail(route) + 1 << TAIL_SHIFT


def route_words(routes: Iterable[int]) -> np.ndarray:
    """int32 words of a home as others see it: its sharded rows, in order.

    Rows that it attends alone, and where they lie in its batch, are nobody else's business: they change no slot of the exchange.
    """
    routes = list(routes)
    words = {route: route_word32(route) for route in set(routes)}
    return np.array([words[route] for route in routes], dtype=np.int32)


def guests_per_instance(routes: Sequence[Sequence[int]], groups: Sequence[range]) -> list[int]:
    """Rows that each instance attends for other homes; routes[h]: those of home h's sharded rows, by places in its group."""
    counts = [0] * len(routes)
    for group in groups:
        for place, home in enumerate(group):
            for route, rows in Counter(routes[home]).items():
                mask = shard_mask(route) & ~(1 << place)
                while mask:
                    low = mask & -mask
                    counts[group[low.bit_length() - 1]] += rows
                    mask ^= low
    return counts
