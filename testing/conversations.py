"""Conversations of given token ids: what each turn asks, and what stock SGLang answers."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

from testing.client import Answer, Client

NUM_TURNS, NEW_TOKENS, OUTPUT_TOKENS = 4, 90, 8


def words(count: int, seed: int) -> list[int]:
    """Random token ids."""
    choose = random.Random(seed)
    return [choose.randrange(5, 60) for _ in range(count)]


def ask(client: Client, ids: list[int], degree: int | None = None, home: int = 0, num_tokens: int = OUTPUT_TOKENS, **fields: Any) -> Answer:
    """Scored outputs alone: a scored prompt would have to be computed."""
    pin = {"custom_params": {"dyncp": {"degree": degree, "home": home}}} if degree else {}
    fields = {"return_logprob": True, "top_logprobs_num": 2} | fields
    return client.generate(ids, max_new_tokens=num_tokens, sampling={"ignore_eos": True} | pin, **fields)


@dataclass
class Conversation:
    """turns: prompt and answer of each."""

    turns: list[tuple[list[int], Answer]] = field(default_factory=list)


def hold(client: Client, length: int, seed: int, num_turns: int = NUM_TURNS) -> Conversation:
    """A conversation as this server answers it."""
    talk, ids = Conversation(), words(length, seed)
    for turn in range(num_turns):
        answer = ask(client, ids)
        talk.turns.append((ids, answer))
        ids = [*ids, *answer.ids, *words(NEW_TOKENS, seed + 100 + turn)]
    return talk


def hold_all(client: Client) -> list[Conversation]:
    """Three of four turns, then ten of two."""
    return [hold(client, length, seed) for length, seed in ((430, 1), (450, 2), (1100, 4))] + [
        hold(client, 600 + 37 * index, 10 + index, num_turns=2) for index in range(10)
    ]


def whole_pages(earlier: list[int], answer: Answer, ids: list[int], page_size: int) -> int:
    """Tokens of the match with an earlier turn, by its prompt and answer: the last token of an answer is never stored, that of a prompt is
    computed."""
    stored = [*earlier, *answer.ids[:-1]]
    same = next((i for i, (a, b) in enumerate(zip(stored, ids, strict=False)) if a != b), min(len(stored), len(ids)))
    return min(same, len(ids) - 1) // page_size * page_size
