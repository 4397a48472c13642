"""Which retained sequence of a home begins with the same tokens as a new prompt, in whole pages.

A page's digest covers its tokens and all before them, so one comparison tells whether two sequences agree up to the end of that page, and
the length of a match is found by bisection.
"""

from __future__ import annotations

from collections.abc import Sequence

from sglang_dcp.policy.prefix_digests import DIGEST_BYTES, chained_digests


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


class PrefixIndex:
    """Handles by the digests of their pages."""

    def __init__(self) -> None:
        self._digests: dict[int, bytes] = {}
        self._of_first_page: dict[bytes, tuple[int, ...]] = {}

    def __len__(self) -> int:
        return len(self._digests)

    def put(self, handle: int, digests: bytes) -> None:
        self._digests[handle] = digests
        first = digests[:DIGEST_BYTES]
        self._of_first_page[first] = (*self._of_first_page.get(first, ()), handle)

    def take(self, handle: int) -> bytes:
        """Removes a handle and returns its digests. KeyError when it is not there."""
        digests = self._digests.pop(handle)
        first = digests[:DIGEST_BYTES]
        others = tuple(other for other in self._of_first_page[first] if other != handle)
        if others:
            self._of_first_page[first] = others
        else:
            del self._of_first_page[first]
        return digests

    def matches(self, digests: bytes) -> list[tuple[int, int]]:
        """(handle, leading pages in common) of all with at least one, the longest match first, then the newest."""
        same = self._of_first_page.get(digests[:DIGEST_BYTES], ())
        return sorted(((handle, common_pages(self._digests[handle], digests)) for handle in same), key=lambda match: (-match[1], -match[0]))
