"""Control messages between instances: what one scheduler tells all others within a step.

A message is `[kind, num_words, words...]` of int64; an instance's messages of a step are concatenated and travel in one all-gather, so
every instance reads the same words in the same order. Handles are numbered by the home that issued them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar


class MessageError(ValueError):
    """Words that do not form messages."""


@dataclass(frozen=True, slots=True)
class AskAdmission:
    """A home asks for all pages of a request: `segments` of (instance, pages) in sequence order, the last one being the tail.

    `born` is the step in which the home first asked; with the home and the handle it makes the total order. A `flexible` ask may be
    split otherwise when its own split does not fit; one for a single instance may go to another, whole.

    `previous` is the handle of a retained sequence that the request takes over at the grant, 0 for none: its first pages, `kept` of
    (instance, pages), become the request's own, and the segments are those behind them. One that `borrows` reads them: others do too, and
    the sequence stays.
    """

    KIND: ClassVar[int] = 1
    handle: int
    born: int
    flexible: bool
    segments: tuple[tuple[int, int], ...]
    previous: int = 0
    kept: tuple[tuple[int, int], ...] = ()
    borrows: bool = False

    @property
    def taken(self) -> tuple[tuple[int, int], ...]:
        """(instance, pages) that become the request's own."""
        return () if self.borrows else self.kept

    @property
    def num_kept(self) -> int:
        """Pages taken over, or borrowed."""
        return sum(pages for _, pages in self.kept)

    @property
    def whole(self) -> tuple[tuple[int, int], ...]:
        """(instance, pages) of the request once it is granted, every instance once: what it takes over and its segments."""
        if not self.kept:
            return self.segments
        pages = dict(self.kept)
        for rank, count in self.segments:
            pages[rank] = pages.get(rank, 0) + count
        return tuple(pages.items())

    def words(self) -> list[int]:
        pairs = _words((*self.kept, *self.segments))
        return [self.handle, self.born, int(self.flexible), self.previous, int(self.borrows), len(self.kept), *pairs]

    @classmethod
    def parse(cls, words: Sequence[int]) -> AskAdmission:
        handle, born, flexible, previous, borrows, num_kept, *rest = words
        pairs = _pairs(rest)
        if num_kept > len(pairs):
            raise MessageError(f"handle {handle} keeps pages on {num_kept} instances, {len(pairs)} pairs are there")
        return cls(handle, born, bool(flexible), pairs[num_kept:], previous, pairs[:num_kept], bool(borrows))


@dataclass(frozen=True, slots=True)
class AskGrowth:
    """A home asks for one more tail page: number `page_index` of the sequence. `shards` hold the request already.

    `stuck` says that the request sits out until it gets the page.
    """

    KIND: ClassVar[int] = 2
    handle: int
    born: int
    stuck: bool
    page_index: int
    shards: tuple[int, ...]

    def words(self) -> list[int]:
        return [self.handle, self.born, int(self.stuck), self.page_index, *self.shards]

    @classmethod
    def parse(cls, words: Sequence[int]) -> AskGrowth:
        handle, born, stuck, page_index, *shards = words
        return cls(handle, born, bool(stuck), page_index, tuple(shards))


@dataclass(frozen=True, slots=True)
class Granted:
    """A shard names the pages that it gave to `home`'s `handle`: sequence indices `first_index`, ... in order."""

    KIND: ClassVar[int] = 3
    home: int
    handle: int
    first_index: int
    pages: tuple[int, ...]

    def words(self) -> list[int]:
        return [self.home, self.handle, self.first_index, *self.pages]

    @classmethod
    def parse(cls, words: Sequence[int]) -> Granted:
        home, handle, first_index, *pages = words
        return cls(home, handle, first_index, tuple(pages))


@dataclass(frozen=True, slots=True)
class Release:
    """A home gives up a handle: open asks are withdrawn and every guest page of it is free."""

    KIND: ClassVar[int] = 4
    handle: int

    def words(self) -> list[int]:
        return [self.handle]

    @classmethod
    def parse(cls, words: Sequence[int]) -> Release:
        (handle,) = words
        return cls(handle)


@dataclass(frozen=True, slots=True)
class Retain:
    """A home's request is over and its first own pages stay for a later one: `pages` of (instance, pages). All behind them are free."""

    KIND: ClassVar[int] = 6
    handle: int
    pages: tuple[tuple[int, int], ...]

    @property
    def num_pages(self) -> int:
        return sum(pages for _, pages in self.pages)

    def words(self) -> list[int]:
        return [self.handle, *_words(self.pages)]

    @classmethod
    def parse(cls, words: Sequence[int]) -> Retain:
        handle, *rest = words
        return cls(handle, _pairs(rest))


@dataclass(frozen=True, slots=True)
class Share:
    """The first own pages of a home's running request, `pages` of (instance, pages), become the retained sequence `base`, for others to
    read. The request goes on and reads them too."""

    KIND: ClassVar[int] = 7
    handle: int
    base: int
    pages: tuple[tuple[int, int], ...]

    @property
    def num_pages(self) -> int:
        return sum(pages for _, pages in self.pages)

    def words(self) -> list[int]:
        return [self.handle, self.base, *_words(self.pages)]

    @classmethod
    def parse(cls, words: Sequence[int]) -> Share:
        handle, base, *rest = words
        return cls(handle, base, _pairs(rest))


@dataclass(slots=True, unsafe_hash=True)
class Row:
    """One sharded request of a step: queries at positions prefix_len .. prefix_len + num_new - 1. Nobody changes one; dataclass would pay
    for that with a call per field.

    route: the shards that take part and the one that takes the last token's K/V (routes.py). A steady row keeps it until its tail moves.
    """

    handle: int
    prefix_len: int
    num_new: int
    route: int = 0


@dataclass(slots=True)
class RowColumns:
    """A home's rows in batch order, as a list of each of `Row`'s fields: a step in which one request joins tells all of them, on every
    instance. The lists are not to be changed. checksum: row_table.py's, once it was asked for."""

    handles: list[int]
    prefix_lens: list[int]
    nums_new: list[int]
    routes: list[int]
    checksum: int | None = field(default=None, compare=False, repr=False)

    @classmethod
    def of(cls, rows: Iterable[Row]) -> RowColumns:
        rows = tuple(rows)
        handles, prefix_lens = [row.handle for row in rows], [row.prefix_len for row in rows]
        return cls(handles, prefix_lens, [row.num_new for row in rows], [row.route for row in rows])

    def __len__(self) -> int:
        return len(self.handles)

    def __iter__(self) -> Iterator[Row]:
        return map(Row, self.handles, self.prefix_lens, self.nums_new, self.routes)


@dataclass(frozen=True, slots=True)
class Rows:
    """A home's sharded rows of this step. Without this message they are the last step's, one token on. Its words are column by column."""

    KIND: ClassVar[int] = 5
    rows: RowColumns

    def words(self) -> list[int]:
        rows = self.rows
        return [*rows.handles, *rows.prefix_lens, *rows.nums_new, *rows.routes]

    @classmethod
    def parse(cls, words: Sequence[int]) -> Rows:
        if len(words) % 4:
            raise MessageError(f"a Rows message has {len(words)} words, not a multiple of 4")
        words, size = list(words), len(words) // 4
        return cls(RowColumns(words[:size], words[size : 2 * size], words[2 * size : 3 * size], words[3 * size :]))


Message = AskAdmission | AskGrowth | Granted | Release | Rows | Retain | Share
_KINDS: dict[int, type[Message]] = {kind.KIND: kind for kind in (AskAdmission, AskGrowth, Granted, Release, Rows, Retain, Share)}


def _words(pairs: Iterable[tuple[int, int]]) -> Iterator[int]:
    return (word for pair in pairs for word in pair)


def _pairs(words: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """ValueError for a word without its other half."""
    return tuple(zip(words[::2], words[1::2], strict=True))


def encode(messages: Iterable[Message]) -> list[int]:
    words: list[int] = []
    for message in messages:
        payload = message.words()
        words += [message.KIND, len(payload), *payload]
    return words


def decode(words: Sequence[int]) -> Iterator[Message]:
    """Reads messages from `words`. Raises MessageError on an unknown kind or a cut message."""
    position = 0
    while position < len(words):
        if position + 2 > len(words):
            raise MessageError(f"message header cut at word {position} of {len(words)}")
        kind, size = words[position], words[position + 1]
        if kind not in _KINDS:
            raise MessageError(f"unknown message kind {kind} at word {position}")
        end = position + 2 + size
        if size < 0 or end > len(words):
            raise MessageError(f"message at word {position} claims {size} words, {len(words) - position - 2} are there")
        try:
            yield _KINDS[kind].parse(words[position + 2 : end])
        except (TypeError, ValueError) as error:
            raise MessageError(f"message of kind {kind} at word {position}: {error}") from error
        position = end
