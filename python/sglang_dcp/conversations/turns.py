"""One request of a conversation, as far as a cache of prompts is concerned."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

BLOCK_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Turn:
    """One request. blocks: an id per whole block of the prompt; two that agree stand behind the same tokens of the same conversation.
    service_s: how long it holds its pages once they are there."""

    arrival_s: float
    conversation: int
    prompt_tokens: int
    output_tokens: int
    service_s: float
    blocks: np.ndarray = field(repr=False)


def common_blocks(left: np.ndarray, right: np.ndarray) -> int:
    """Leading blocks that two prompts have in common."""
    count = min(len(left), len(right))
    differ = left[:count] != right[:count]
    return int(differ.argmax()) if differ.any() else count
