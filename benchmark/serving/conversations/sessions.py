"""Sessions of a trace, cut down to what small pools on a CPU can hold.

The simulator counts in blocks of 64 tokens, a server's pages are smaller: one block stands for one page, so a prompt has as many blocks
there as it has whole pages here, and both find the same beginnings.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmark.simulate.conversations.turns import read_conversations
from sglang_dcp.conversations.turns import BLOCK_TOKENS, Turn

PAGE_TOKENS = 16
TOKENS_PER_SERVED = BLOCK_TOKENS // PAGE_TOKENS
"""Tokens of the simulator that stand for one of the server."""
VOCABULARY = range(5, 60)
"""Letters of the tiny models."""
LONGEST_THINK_S = 300.0
"""Of a user between two turns; who is away longer comes back after this. Time of the trace."""


@dataclass(frozen=True)
class Session:
    """Turns of one conversation, each `think_s[i]` after the end of the one before it. Lengths are the simulator's."""

    number: int
    turns: tuple[Turn, ...]
    think_s: tuple[float, ...]


def choose_sessions(trace: Path, *, divide: int, pool_tokens: int, count: int, num_turns: int, hurry: float, seed: int) -> list[Session]:
    """`count` sessions of `num_turns` consecutive turns each, from anywhere in conversations of the trace. Turns that would not fit a pool
    with a page to spare are left out.

    divide: of lengths, on the server. hurry: the trace's time over the server's.
    """
    if divide % TOKENS_PER_SERVED:
        raise ValueError(f"--divide {divide} must be a multiple of {TOKENS_PER_SERVED}: blocks are cut to whole blocks of the trace")
    chosen: list[Session] = []
    choose = random.Random(seed)
    conversations = read_conversations(trace, divide // TOKENS_PER_SERVED)
    for turns in choose.sample(conversations, len(conversations)):
        fitting = [turn for turn in turns if served_tokens(turn) + served_output(turn) <= pool_tokens - 2 * PAGE_TOKENS]
        if len(fitting) < num_turns or len(chosen) == count:
            continue
        first = choose.randrange(len(fitting) - num_turns + 1)
        part = fitting[first : first + num_turns]
        chosen.append(Session(len(chosen), tuple(part), (0.0, *_think(part, hurry))))
    if len(chosen) < count:
        raise ValueError(f"{len(chosen)} of {count} sessions have {num_turns} turns that fit {pool_tokens} tokens (--turns, --pool-tokens)")
    return chosen


def _think(turns: Sequence[Turn], hurry: float) -> list[float]:
    gaps = [later.arrival_s - turn.arrival_s - turn.service_s for turn, later in zip(turns, turns[1:], strict=False)]
    return [min(max(0.0, gap), LONGEST_THINK_S) / hurry for gap in gaps]


def served_tokens(turn: Turn) -> int:
    """Of the prompt, on the server."""
    return -(-turn.prompt_tokens // TOKENS_PER_SERVED)


def served_output(turn: Turn) -> int:
    return -(-turn.output_tokens // TOKENS_PER_SERVED)


def prompt_ids(session: Session, index: int) -> list[int]:
    """Token ids of a turn's prompt: the same for the same blocks, its own behind the last whole one."""
    turn = session.turns[index]
    ids: list[int] = []
    for block in turn.blocks.tolist():
        choose = random.Random(f"{session.number} {block}")
        ids += choose.choices(VOCABULARY, k=PAGE_TOKENS)
    choose = random.Random(f"{session.number} turn {index}")
    return ids + choose.choices(VOCABULARY, k=served_tokens(turn) - len(ids))
