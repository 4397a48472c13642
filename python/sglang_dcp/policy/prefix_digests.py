"""Digests of the beginnings of a prompt, for whoever looks for an earlier one that begins alike: the router, and a home's ledger."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Sequence

DIGEST_BYTES = 16
"""Per block. Two different beginnings share one with a chance of 2^-128: an answer never rests on another client's tokens."""


def chained_digests(tokens: Sequence[int], block_tokens: int, namespace: Sequence[str | None] = ()) -> Iterator[bytes]:
    """DIGEST_BYTES for each whole block of `tokens`; each covers all tokens before it too. namespace: what keeps equal tokens apart
    (extra_key, cache_salt)."""
    words = memoryview(array("q", tokens)).cast("B")
    chain = hashlib.blake2b(repr(tuple(namespace)).encode(), digest_size=DIGEST_BYTES).digest()
    width = 8 * block_tokens
    for start in range(0, len(words) - width + 1, width):
        chain = hashlib.blake2b(words[start : start + width], digest_size=DIGEST_BYTES, key=chain).digest()
        yield chain
