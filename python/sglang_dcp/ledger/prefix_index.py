"""Which retained sequence of a home begins with the same tokens as a new prompt, in whole pages.

A page's digest covers its tokens and all before them, so one comparison tells whether two sequences agree up to the end of that page, and
the length of a match is found by bisection.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from sglang_dcp.policy.prefix_digests import DIGEST_BYTES, chained_digests

MOST_LOST = 0.5
"""A request takes a sequence over if at most this share of it lies behind the match, which is lost: a common beginning of a few pages must
not cost a long conversation its prefix."""


def page_digests(tokens: Sequence[int], page_size: int, namespace: Sequence[str | None] = ()) -> bytes:
    """The digests of all whole pages of `tokens`, one behind the other. namespace: as for chained_digests."""
    return b"".join(chained_digests(tokens, page_size, namespace))


def common_pages(left: bytes, right: bytes) -> int:
    """Leading pages that two digests have in common."""
    low, high = 0, min(len(left), len(right)) // DIGEST_BYTES
    while low < high:
        middle = (low + high + 1) // 2
        span = slice((middle - 1) * DIGEST_BYTES, middle * DIGEST_BYTES)
        if left[span] == right[span]:
            low = middle
        else:
            high = middle - 1
    return low


def least_pages(num_pages: int) -> int:
    """Leading pages that must agree, of a sequence of so many."""
    return num_pages - int(MOST_LOST * num_pages)


class PrefixIndex:
    """Handles by the digest of the beginning that must agree: sequences that have less in common with a prompt, as all that follow one
    system prompt do, are not looked at. lengths: of these beginnings, in pages, and how many handles have each."""

    def __init__(self) -> None:
        self._digests: dict[int, bytes] = {}
        self._first: dict[int, int] = {}
        self._of_beginning: dict[bytes, tuple[int, ...]] = {}
        self._lengths: Counter[int] = Counter()

    def __len__(self) -> int:
        return len(self._digests)

    def put(self, handle: int, digests: bytes, first: int = 0) -> None:
        """digests: of the sequence's pages from the first-th on. Those before it are another sequence's: a prompt must go beyond them."""
        self._digests[handle] = digests
        if first:
            self._first[handle] = first
        length, beginning = _beginning(digests, first)
        self._of_beginning[beginning] = (*self._of_beginning.get(beginning, ()), handle)
        self._lengths[length] += 1

    def take(self, handle: int) -> bytes:
        """Removes a handle and returns its digests. KeyError when it is not there."""
        digests = self._digests.pop(handle)
        length, beginning = _beginning(digests, self._first.pop(handle, 0))
        others = tuple(other for other in self._of_beginning[beginning] if other != handle)
        if others:
            self._of_beginning[beginning] = others
        else:
            del self._of_beginning[beginning]
        self._lengths[length] -= 1
        if not self._lengths[length]:
            del self._lengths[length]
        return digests

    def matches(self, digests: bytes) -> list[tuple[int, int]]:
        """(handle, leading pages in common) of all with enough of theirs, the longest match first, then the newest."""
        same = [handle for length in self._lengths for handle in self._of_beginning.get(_page(digests, length), ())]
        return sorted(((handle, self._common(handle, digests)) for handle in same), key=lambda match: (-match[1], -match[0]))

    def _common(self, handle: int, digests: bytes) -> int:
        first = self._first.get(handle, 0)
        return first + common_pages(self._digests[handle], digests[first * DIGEST_BYTES :])


def _beginning(digests: bytes, first: int) -> tuple[int, bytes]:
    """(pages, digest) of what a prompt must have in common with a sequence of `first` pages and these."""
    length = max(first + 1, least_pages(first + len(digests) // DIGEST_BYTES))
    return length, _page(digests, length - first)


def _page(digests: bytes, number: int) -> bytes:
    """The digest of the `number`-th page, which covers all before it; of none where there are fewer."""
    return digests[(number - 1) * DIGEST_BYTES : number * DIGEST_BYTES]
