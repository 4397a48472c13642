"""Turns of a trace whose prompts come as ids of blocks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sglang_dcp.conversations.turns import BLOCK_TOKENS, Turn
from sglang_dcp.traces.records import TraceRequest

TOGETHER_TOKENS = 1024
"""Prompts that begin alike for so long count as one conversation; what is shorter is not kept (--dyncp-cache-min-tokens)."""


def turns_of(requests: Sequence[TraceRequest], block_tokens: int, step_s: float) -> list[Turn]:
    """step_s: seconds per output token, for which a turn holds its pages. Raises ValueError for blocks that are no multiple of ours."""
    if block_tokens <= 0 or block_tokens % BLOCK_TOKENS:
        raise ValueError(f"blocks of {block_tokens} tokens, expected a multiple of {BLOCK_TOKENS}")
    parts = block_tokens // BLOCK_TOKENS
    decisive = max(0, TOGETHER_TOKENS // block_tokens - 1)
    numbers: dict[int, int] = {}
    turns: list[Turn] = []
    for item in requests:
        ids = np.asarray(item.blocks, dtype=np.int64)
        blocks = (ids[:, None] * parts + np.arange(parts)).ravel()[: item.prompt_tokens // BLOCK_TOKENS]
        key = item.blocks[min(decisive, len(item.blocks) - 1)] if item.blocks else -1 - len(turns)
        conversation = numbers.setdefault(key, len(numbers))
        turns.append(Turn(item.arrival_s, conversation, item.prompt_tokens, item.output_tokens, step_s * item.output_tokens, blocks))
    return turns
