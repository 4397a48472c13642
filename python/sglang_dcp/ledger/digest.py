"""Digests by which instances tell that they agree: of a home's rows, of the asks that are open (decision_digest.py: of what was decided).

Any change of the words gives another digest, two that make up for each other and two that change places too, but for one chance in 2^62.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Hashable, Iterable, Sequence

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
