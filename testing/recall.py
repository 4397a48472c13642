"""Pass-key prompts for the two trained models, and the same as token ids. One byte is one token."""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass
from pathlib import Path

from testing.models import train_recall
from testing.models.train_recall import make_prompt

MODELS = Path(__file__).resolve().parent / "models"
MODEL_NAMES = ("qwen3moe", "deepseek_v2")
VOCABULARY_SIZE = 320
EOS = train_recall.EOS
KEY_LENGTH = train_recall.K
LAST_POSITION = train_recall.MAX_POSITIONS - 1

_TAIL_LENGTH = len("\n?#")
_BLOCK_LENGTH = len(" #7BHN. ")
_BLOCK_OFFSET = 2
"""The key's first character stands behind a blank and its name."""


@dataclass(frozen=True)
class RecallPrompt:
    """A prompt with its right answer. `text` has exactly `length` bytes, hence tokens."""

    text: str
    answer: str
    depth: float

    @property
    def ids(self) -> list[int]:
        return encode(self.text)


def model_path(name: str) -> str:
    if name not in MODEL_NAMES:
        raise ValueError(f"no test model {name!r}; there are {', '.join(MODEL_NAMES)}")
    return str(MODELS / name)


def recall_prompt(length: int, depth: float, seed: int, *, scatter: bool = False, keys: int = 1) -> RecallPrompt:
    """The prompt that belongs to these arguments; see README of testing/models for what each model can be asked."""
    text, answer = make_prompt(length, depth, random.Random(seed), scatter=scatter, keys=keys)
    return RecallPrompt(text, answer, depth)


def depth_at(length: int, position: int) -> float:
    """The depth that puts the first key character at token `position` of a prompt with one unscattered key."""
    body = length - _TAIL_LENGTH - _BLOCK_LENGTH
    start = position - _BLOCK_OFFSET
    if not 0 <= start <= body:
        raise ValueError(f"a key cannot start at token {position} of {length}; it may lie in [{_BLOCK_OFFSET}, {body + _BLOCK_OFFSET}]")
    return start / body


def encode(text: str) -> list[int]:
    """Token ids of printable ASCII and new lines, without a tokenizer object."""
    table = _byte_ids()
    return [table[character] for character in text]


def random_ids(length: int, seed: int) -> list[int]:
    """Random printable tokens: prompts for log-probabilities, where nothing is recalled."""
    rng = random.Random(seed)
    choices = sorted(_byte_ids().values())
    return [rng.choice(choices) for _ in range(length)]


@functools.cache
def _byte_ids() -> dict[str, int]:
    return train_recall.byte_ids()
