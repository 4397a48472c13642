"""Stock: every instance keeps a tree of prompt pages of its own, the longest unused leaf goes first."""

from __future__ import annotations

from collections import Counter, OrderedDict

import numpy as np

from sglang_dcp.conversations.router import Router
from sglang_dcp.conversations.turns import BLOCK_TOKENS, Turn

CHUNK_BLOCKS = 4
"""Blocks that are kept or evicted together: a tree of single blocks is four times the work and tells the same."""
CHUNK_TOKENS = BLOCK_TOKENS * CHUNK_BLOCKS


class PrefixTree:
    """Of one instance, in chunks. A chunk's key stands for all tokens before it too, so a set of keys is a tree."""

    def __init__(self, num_chunks: int) -> None:
        self.num_chunks = num_chunks
        self.num_output_chunks = 0
        self._unused: OrderedDict[int, None] = OrderedDict()
        self._in_use: Counter[int] = Counter()

    def start(self, keys: list[int], output_chunks: int) -> int | None:
        """Leading chunks that are there already, None when there is no room; all are held until `finish`."""
        added = sum(key not in self._in_use for key in keys)
        held = len(self._in_use) + self.num_output_chunks + output_chunks + added
        if held > self.num_chunks:
            return None
        hit = 0
        while hit < len(keys) and (keys[hit] in self._in_use or keys[hit] in self._unused):
            hit += 1
        for key in keys:
            self._in_use[key] += 1
            self._unused.pop(key, None)
        self.num_output_chunks += output_chunks
        while len(self._in_use) + self.num_output_chunks + len(self._unused) > self.num_chunks:
            self._unused.popitem(last=False)
        return hit

    def finish(self, keys: list[int], output_chunks: int) -> None:
        """The last chunk is the first to go: a leaf before what it hangs on."""
        self.num_output_chunks -= output_chunks
        for key in reversed(keys):
            self._in_use[key] -= 1
            if not self._in_use[key]:
                del self._in_use[key]
                self._unused[key] = None


class TreePerInstance:
    """Turns land where `router` says and find what that instance has."""

    def __init__(self, router: Router, num_instances: int, pool_tokens: int) -> None:
        self.router = router
        self._trees = [PrefixTree(pool_tokens // CHUNK_TOKENS) for _ in range(num_instances)]
        self._waiting: list[tuple[Turn, int]] = []
        self._homes: dict[int, int] = {}

    def arrive(self, turn: Turn) -> None:
        self._waiting.append((turn, self.router.place(turn).home))

    def begin(self) -> list[tuple[Turn, int]]:
        """(turn, cached tokens) of those that begin now."""
        begun, waiting, blocked = [], [], set()
        for turn, home in self._waiting:
            hit = None if home in blocked else self._trees[home].start(_keys(turn), _output_chunks(turn))
            if hit is None:
                waiting.append((turn, home))
                blocked.add(home)
                continue
            self._homes[id(turn)] = home
            begun.append((turn, min(hit * CHUNK_TOKENS, turn.prompt_tokens - 1)))
        self._waiting = waiting
        return begun

    def finish(self, turn: Turn) -> None:
        home = self._homes.pop(id(turn))
        self._trees[home].finish(_keys(turn), _output_chunks(turn))
        self.router.finish(turn)


def _keys(turn: Turn) -> list[int]:
    blocks: np.ndarray = turn.blocks[CHUNK_BLOCKS - 1 :: CHUNK_BLOCKS].astype(np.int64)
    return (blocks + (turn.conversation << 32)).tolist()


def _output_chunks(turn: Turn) -> int:
    """Also what of the prompt is no whole chunk."""
    whole = len(turn.blocks) // CHUNK_BLOCKS * CHUNK_TOKENS
    return -(-(turn.prompt_tokens - whole + turn.output_tokens) // CHUNK_TOKENS)
