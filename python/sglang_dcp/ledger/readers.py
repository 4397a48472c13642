"""Who reads the first pages of which retained sequence: several questions to one document read one copy of it.

A reader is a request that runs, or, under the same handle, the sequence that it left: its own pages, behind those that it reads. What is
read may read another one in turn. Part of the replicated table: the same on every instance.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

Key = tuple[int, int]
"""(home, handle)"""


class Readers:
    """The methods that change something return the sequences that are read by a running request now and were not, or the other way."""

    def __init__(self) -> None:
        self._base: dict[Key, Key] = {}
        self._retained: Counter[Key] = Counter()
        self._running: Counter[Key] = Counter()

    def base_of(self, key: Key) -> Key | None:
        """The sequence that a reader reads."""
        return self._base.get(key)

    def lineage(self, key: Key | None) -> Iterator[Key]:
        """A sequence, what it reads, what that reads, and so on."""
        while key is not None:
            yield key
            key = self._base.get(key)

    def num_retained(self, key: Key) -> int:
        """Sequences that read this one."""
        return self._retained[key]

    def is_read_by_running(self, key: Key) -> bool:
        """A request reads it, or something that reads it."""
        return self._running[key] > 0

    def start(self, base: Key, reader: Key) -> list[Key]:
        """A request begins to run."""
        self._base[reader] = base
        return self._count_running(base, 1)

    def end(self, reader: Key) -> list[Key]:
        """It is over and leaves nothing. Nothing happens for one that reads nothing."""
        return self._count_running(self._base.pop(reader, None), -1)

    def rest(self, reader: Key) -> list[Key]:
        """It is over and leaves a sequence."""
        base = self._base.get(reader)
        if base is not None:
            self._retained[base] += 1
        return self._count_running(base, -1)

    def insert(self, base: Key, reader: Key) -> list[Key]:
        """A running request reads `base` from now on, which reads what it has read so far."""
        above = self._base.get(reader)
        self._base[reader] = base
        self._running[base] += 1
        if above is not None:
            self._base[base] = above
            self._retained[above] += 1
        return [base]

    def go(self, key: Key) -> None:
        """A sequence leaves the table. ValueError while another one, or a running request, reads it."""
        if self._retained[key] or self._running[key]:
            num_readers = self._retained[key], self._running[key]
            raise ValueError(f"home {key[0]}, handle {key[1]} is read by {num_readers[0]} sequences and {num_readers[1]} requests")
        base = self._base.pop(key, None)
        if base is not None:
            _decrement(self._retained, base)
        for counts in (self._retained, self._running):
            counts.pop(key, None)

    def _count_running(self, base: Key | None, change: int) -> list[Key]:
        turned = []
        for key in self.lineage(base):
            before = self._running[key]
            self._running[key] = before + change
            if not before or before + change == 0:
                turned.append(key)
        return turned


def _decrement(counts: Counter[Key], key: Key) -> None:
    counts[key] -= 1
    if not counts[key]:
        del counts[key]
