"""Ours: sequences that outlive their request, taken over and evicted by the ledger's own decisions (ReservationTable)."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from sglang_dcp.conversations.router import Router
from sglang_dcp.conversations.turns import BLOCK_TOKENS, Turn, common_blocks
from sglang_dcp.ledger.messages import AskAdmission
from sglang_dcp.ledger.prefix_index import MOST_LOST
from sglang_dcp.ledger.reservations import Grant, ReservationTable
from sglang_dcp.policy.split_limits import Split, SplitLimits

Key = tuple[int, int]


@dataclass(slots=True)
class PromptSequence:
    """A turn's pages, in order (instance, pages).

    cached: tokens of its prompt that an earlier turn left. whole: neither it nor what it took over was ever split: a server leaves it to
    SGLang's tree. borrowed: leading pages that are another sequence's, which it reads.
    """

    turn: Turn
    home: int
    placed: Split
    born: int
    pages: tuple[tuple[int, int], ...] = ()
    cached: int = 0
    whole: bool = False
    borrowed: int = 0

    def own(self, count: int) -> Split:
        """Of its first pages, those that are its own, by instance."""
        return _by_rank(_behind(_first(self.pages, count), self.borrowed))


class RetainedSequences:
    """All turns are managed: a prompt that fits one instance leaves a sequence on one. Pages are blocks of the trace. What a turn that runs
    has is there at once for others to read.

    tokens: of prompts. promoted: found here, left by a whole turn and wanted by a split one, which a server computes anew. Not found
    here either: elsewhere, what another home kept; in_use, what a turn of this home has.
    """

    def __init__(self, router: Router, limits: SplitLimits, cache_fraction: float = 1.0) -> None:
        self.router, self.limits = router, limits
        self.table = ReservationTable(limits)
        self._most_retained = int(cache_fraction * limits.pool_pages)
        self._live = [0] * limits.layout.num_instances
        self._asked: dict[Key, PromptSequence] = {}
        self._running: dict[int, tuple[Key, PromptSequence]] = {}
        self._kept: dict[Key, PromptSequence] = {}
        self._names: dict[Key, Key | None] = {}
        self._taken: set[Key] = set()
        self._of: dict[tuple[int, int], list[Key]] = {}
        self._step = 0
        self.tokens: Counter[str] = Counter()

    def arrive(self, turn: Turn) -> None:
        self._step += 1
        placement = self.router.place(turn)
        pages = [-(-tokens // BLOCK_TOKENS) for tokens in placement.shard_tokens]
        sequence = PromptSequence(turn, placement.home, tuple(zip(placement.shards, pages, strict=True)), self._step)
        self._ask((placement.home, self._step), sequence, with_match=True)

    def begin(self) -> list[tuple[Turn, int]]:
        """(turn, cached tokens) of those that are granted now. Decides until nothing changes, as steps would."""
        begun: list[tuple[Turn, int]] = []
        while True:
            free = [self.limits.pool_pages - live - kept for live, kept in zip(self._live, self.table.retained.pages, strict=True)]
            decision = self.table.decide(free, [self.limits.pool_pages] * len(free), True, most_retained=self._most_retained)
            for grant in decision.grants:
                begun.append(self._take(grant))
            for eviction in decision.evicted:
                self._forget(eviction[:2])
            lost = [key for key, previous in self._names.items() if previous is not None and previous not in self._kept]
            for key in lost:
                self._ask(key, self._asked[key], with_match=False)
            if not decision.grants and not lost:
                return begun

    def finish(self, turn: Turn) -> None:
        key, sequence = self._running.pop(id(turn))
        self.router.finish(turn)
        self._live_pages(sequence, -1)
        own = sequence.own(len(turn.blocks))
        self._step += 1
        if own:
            sequence.pages = _first(sequence.pages, len(turn.blocks))
            self.table.retained.put(*key, own, self._step)
            self._keep(key, sequence)
        else:
            self.table.retained.end(key)

    def _keep(self, key: Key, sequence: PromptSequence) -> None:
        self._kept[key] = sequence
        self._of.setdefault((sequence.home, sequence.turn.conversation), []).append(key)

    def _live_pages(self, sequence: PromptSequence, sign: int) -> None:
        """Its own pages come or go."""
        for rank, count in _behind(sequence.pages, sequence.borrowed):
            self._live[rank] += sign * count

    def _ask(self, key: Key, sequence: PromptSequence, *, with_match: bool) -> None:
        turn = sequence.turn
        total = -(-(turn.prompt_tokens + turn.output_tokens) // BLOCK_TOKENS)
        previous, matched = self._match(sequence, turn) if with_match else (None, 0)
        if with_match and (shared := self._share(sequence, turn, matched)) is not None:
            previous, matched = shared
        borrows = previous is not None and self._is_shared(previous)
        self._count(sequence, previous, matched, with_match=with_match)
        kept = _by_rank(_first(self._kept[previous].pages, matched if borrows else total)) if previous is not None else ()
        missing = total - sum(count for _, count in kept)
        segments = self.limits.split(key[0], missing, [self.limits.pool_pages] * len(self._live), kept) if kept else None
        if segments is None:
            kept, matched, previous, borrows = (), 0, None, False
            segments = self.limits.complete(key[0], sequence.placed, total)
            if segments is None:
                raise ValueError(f"a turn of {turn.prompt_tokens + turn.output_tokens} tokens fits no split of {self.limits}")
        sequence.cached = min(matched * BLOCK_TOKENS, turn.prompt_tokens - 1)
        self._asked[key] = sequence
        self.table.ask(key[0], AskAdmission(key[1], sequence.born, True, segments, previous[1] if previous else 0, kept, borrows))
        self._names[key] = previous
        if previous is not None and not borrows:
            self._taken.add(previous)

    def _count(self, sequence: PromptSequence, previous: Key | None, matched: int, *, with_match: bool) -> None:
        was_whole = previous is None or self._kept[previous].whole
        sequence.whole = was_whole and len(sequence.placed) == 1
        if not with_match:
            return
        turn, home = sequence.turn, sequence.home
        most = max(0, turn.prompt_tokens - 1) // BLOCK_TOKENS

        def beyond(others: Iterable[PromptSequence]) -> int:
            """Tokens that the best of others has beyond the match."""
            same = (common_blocks(other.turn.blocks, turn.blocks) for other in others if other.turn.conversation == turn.conversation)
            return BLOCK_TOKENS * max(0, min(most, max(same, default=0)) - matched)

        if previous is not None and was_whole and not sequence.whole:
            self.tokens["promoted"] += matched * BLOCK_TOKENS
        homes = [rank for rank in range(len(self._live)) if rank != home]
        kept = (self._kept[key] for rank in homes for key in self._of.get((rank, turn.conversation), ()))
        self.tokens["elsewhere"] += beyond(kept)
        running = (other for _, other in self._running.values() if other.home == home)
        waiting = (other for key, other in self._asked.items() if key[0] == home and other is not sequence)
        self.tokens["in_use"] += beyond((*running, *waiting))

    def _match(self, sequence: PromptSequence, turn: Turn) -> tuple[Key | None, int]:
        """As Retention.find: the longest that no waiting turn would take over and of which not too much would be lost."""
        able = [key for key in self._of.get((sequence.home, turn.conversation), ()) if key not in self._taken]
        matches = sorted(((common_blocks(self._kept[key].turn.blocks, turn.blocks), key) for key in able), reverse=True)
        for common, key in matches:
            held = len(self._kept[key].turn.blocks)
            if common > self._kept[key].borrowed and held - common <= MOST_LOST * held:
                return key, common
        return None, 0

    def _is_shared(self, key: Key) -> bool:
        readers = self.table.retained.readers
        return readers.num_retained(key) > 0 or readers.is_read_by_running(key) or key in self._names.values()

    def _share(self, sequence: PromptSequence, turn: Turn, beyond: int) -> tuple[Key, int] | None:
        """As share_with of upstream/step/sharing.py: what the running turn with most in common has becomes a sequence that both read."""
        same = [
            (min(common_blocks(other.turn.blocks, turn.blocks), max(0, turn.prompt_tokens - 1) // BLOCK_TOKENS), key[1], other)
            for key, other in self._running.values()
            if other.home == sequence.home and other.turn.conversation == turn.conversation
        ]
        common, handle, leader = max(same, key=lambda pair: pair[:2], default=(0, 0, sequence))
        if common <= max(beyond, leader.borrowed):
            return None
        self._step += 1
        base = leader.home, self._step
        self._live_pages(leader, -1)
        self.table.retained.share(leader.home, handle, base[1], leader.own(common), self._step)
        part = dataclasses.replace(leader.turn, blocks=leader.turn.blocks[:common])
        self._keep(base, dataclasses.replace(leader, turn=part, pages=_first(leader.pages, common)))
        leader.borrowed = common
        self._live_pages(leader, 1)
        return base, common

    def _take(self, grant: Grant) -> tuple[Turn, int]:
        key = grant.home, grant.handle
        sequence = self._asked.pop(key)
        previous = self._names.pop(key)
        kept: Split = ()
        sequence.borrowed = 0
        if previous is not None:
            kept = _first(self._kept[previous].pages, grant.num_kept)
            sequence.borrowed = grant.num_kept if grant.borrows else self._kept[previous].borrowed
            if not grant.borrows:
                self._forget(previous)
        sequence.pages = (*kept, *((segment.rank, segment.num_pages) for segment in grant.segments))
        self._live_pages(sequence, 1)
        self._running[id(sequence.turn)] = key, sequence
        return sequence.turn, sequence.cached

    def _forget(self, key: Key) -> None:
        """A sequence is gone: taken over or evicted."""
        sequence = self._kept.pop(key)
        self._taken.discard(key)
        of = self._of[sequence.home, sequence.turn.conversation]
        of.remove(key)
        if not of:
            del self._of[sequence.home, sequence.turn.conversation]


def _first(pages: Split, count: int) -> Split:
    """The first pages of a sequence."""
    kept = []
    for rank, here in pages:
        if count > 0:
            kept.append((rank, min(here, count)))
        count -= here
    return tuple(kept)


def _behind(pages: Split, count: int) -> Split:
    """Those behind the first pages."""
    behind = []
    for rank, here in pages:
        if here > count:
            behind.append((rank, here - max(0, count)))
        count -= here
    return tuple(behind)


def _by_rank(pages: Split) -> Split:
    """Every instance once, as messages name them."""
    counts: dict[int, int] = {}
    for rank, count in pages:
        counts[rank] = counts.get(rank, 0) + count
    return tuple(counts.items())
