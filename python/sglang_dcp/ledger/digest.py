"""Digests by which instances tell that they agree: of a home's rows, of the asks that are open, of what was decided.

Any change of the words gives another digest, two that make up for each other and two that change places too, but for one chance in 2^62.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Hashable, Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sglang_dcp.ledger.reservations import Decision

MASK = (1 << 62) - 1
"""A digest is not negative and fits a control column (int64)."""


def digest(words: Iterable[int]) -> int:
    """Of int64 words in their order."""
    return int.from_bytes(hashlib.blake2b(array("q", words), digest_size=8).digest(), "little") & MASK


class OpenDigest:
    """Of a changing set of entries, whatever their order: the sum of the entries' digests. Every change takes constant time."""

    def __init__(self) -> None:
        self.value = 0
        self._of: dict[Hashable, int] = {}

    def put(self, key: Hashable, words: Sequence[int]) -> None:
        """Adds an entry, or replaces the one of this key."""
        self.take(key)
        self._of[key] = digest(words)
        self.value = self.value + self._of[key] & MASK

    def take(self, key: Hashable) -> None:
        """Removes an entry, if it is there."""
        self.value = self.value - self._of.pop(key, 0) & MASK


class DecisionDigest:
    """Of every decision so far and of the asks that were open then: instances that once differed differ ever after."""

    def __init__(self) -> None:
        self.value = 0

    def add(self, decision: Decision, open_asks: int) -> None:
        """open_asks: their digest, before the decision."""
        words = [self.value, open_asks, len(decision.grants)]
        for grant in decision.grants:
            words += (grant.home, grant.handle, len(grant.segments))
            for segment in grant.segments:
                words += (segment.rank, segment.first_index, segment.num_pages)
        words += decision.promised
        for key in decision.victims:
            words += key
        self.value = digest(words)
