"""Comparing two servers' answers by log-probability, with the tie rule: behind a near tie anything may follow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from testing.client import Answer, Token

TIE_GAP = 1e-3
"""Where stock's best two tokens are closer than this, greedy decoding may go either way: output is compared up to there."""


@dataclass(frozen=True)
class Comparison:
    """worst: largest difference of log-probabilities compared; num_compared tokens; num_skipped output tokens behind a near tie."""

    worst: float
    num_compared: int
    num_skipped: int


def compare(stock: Answer, ours: Answer) -> Comparison:
    """All prompt tokens, and output tokens up to the first near tie. AssertionError when an output token differs before it,
    or a log-probability is no number."""
    assert len(stock.prompt_tokens) == len(ours.prompt_tokens)
    differences = [abs(a.logprob - b.logprob) for a, b in zip(stock.prompt_tokens, ours.prompt_tokens, strict=True)]
    end = first_tie(stock.output_tokens)
    for place, (a, b) in enumerate(zip(stock.output_tokens[:end], ours.output_tokens[:end], strict=True)):
        assert a.id == b.id, f"output token {place}: stock {a.id}, ours {b.id}, stock's gap {a.top_gap}"
        differences.append(abs(a.logprob - b.logprob))
    assert not any(map(math.isnan, differences)), "a log-probability is no number"  # max() may leave one out
    return Comparison(max(differences, default=0.0), len(differences), len(stock.output_tokens) - end)


def compare_output(stock: Answer, ours: Answer) -> Comparison:
    """The output tokens alone: a decode server behind prefill servers scores no prompt."""
    return compare(replace(stock, prompt_tokens=()), replace(ours, prompt_tokens=()))


def first_tie(tokens: Sequence[Token]) -> int:
    return next((i for i, token in enumerate(tokens) if token.top_gap is not None and token.top_gap < TIE_GAP), len(tokens))


def assert_same_until_tie(stock: Answer, ours: Answer) -> None:
    """Equal outputs, up to where two tokens are so near to each other that rounding decides."""
    end = first_tie(stock.output_tokens)
    assert ours.ids[:end] == stock.ids[:end]
