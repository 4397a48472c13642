"""What is sent: the simulator's own mix, so that it can be asked what the same arrivals would meet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from benchmark.headline.client import Arrival
from benchmark.headline.weka import weka_lengths
from benchmark.simulate.workloads import SHORT_PROMPT, Workload, chat

BEGINNING_S = 1.0
"""Requests that had begun before the window are sent in its first second."""
DRAWN_BEYOND = 1.2
"""Exponential gaps may end early: so much longer a time is drawn, and what comes after the window left out."""
MOST_RATE = 32.0
"""Requests per second that a history is drawn at; a lower rate keeps part of them."""
WEKA = "weka"

Mix = float | str
"""The share of long prompts among chat turns, or the name of a mix."""


def parse_mix(text: str) -> Mix:
    """`0.03` or `weka`. ValueError for another name, or a share outside 0..1."""
    if text == WEKA:
        return text
    share = float(text)
    if not 0 <= share <= 1:
        raise ValueError(f"--long {text}: a share of long prompts is in 0..1, a name is {WEKA}")
    return share


def mix_name(mix: Mix) -> str:
    """As in the keys of results."""
    return mix if isinstance(mix, str) else f"{mix:g}"


def mix_title(name: str) -> str:
    """For readers, of a name as in the keys of results."""
    return "lengths of coding agents (Weka)" if name == WEKA else f"{100 * float(name):g} % long prompts"


def workload(mix: Mix, longest: int) -> Workload:
    """No prompt above `longest` tokens."""
    return weka_lengths(longest) if isinstance(mix, str) else chat(mix, max_prompt=longest)


def arrivals(
    mix: Mix,
    rate: float,
    seconds: float,
    seed: int,
    longest: int,
    longest_output: int = 4096,
    history_ms: float = 0.0,
    most_rate: float = MOST_RATE,
) -> list[Arrival]:
    """The mix's requests in order of arrival, no prompt above `longest`, no output above `longest_output` tokens.

    history_ms: 0: they come from the start on. Else the time per token by which those that came before the start have aged: who would
    still run begins with what it had generated as part of the prompt (which may so exceed `longest`) and the rest, at least 2 tokens, as
    output. A window shows few of the long prompts, so another draw for every rate would say more of the draw than of the rate: a higher
    rate has all requests of a lower one, at the same times, and more. ValueError for one above most_rate.

    Equal arguments, equal arrivals.
    """
    source = workload(mix, longest)
    if not history_ms:
        return [_arrival(*row, longest, longest_output) for row in source.requests(rate, seconds, seed)]
    if not 0 < rate <= most_rate:
        raise ValueError(f"{rate:g} requests/s with a history: at most {most_rate:g} (MOST_RATE)")
    history_s = longest_output * history_ms / 1000
    rows = source.requests(most_rate, DRAWN_BEYOND * (history_s + seconds), seed)
    kept = np.random.default_rng((seed, 9)).random(len(rows)) < rate / most_rate
    drawn = [
        _arrival(at - history_s, prompt, output, longest, longest_output)
        for (at, prompt, output), keep in zip(rows, kept.tolist(), strict=True)
        if keep and at - history_s < seconds
    ]
    aged = [_aged(one, history_ms) for one in drawn if one.at_s < 0]
    return sorted([*_spread([one for one in aged if one is not None]), *(one for one in drawn if one.at_s >= 0)], key=lambda one: one.at_s)


def _arrival(at_s: float, prompt: int, output: int, longest: int, longest_output: int) -> Arrival:
    return Arrival(at_s, min(prompt, longest), min(longest_output, max(2, output)))


def _aged(one: Arrival, history_ms: float) -> Arrival | None:
    """At 0, what came before; None if it has ended by then."""
    generated = int(-one.at_s * 1000 / history_ms)
    if generated >= one.output_tokens:
        return None
    return Arrival(0.0, one.prompt_tokens + generated, max(2, one.output_tokens - generated), begun=True)


def _spread(begun: Sequence[Arrival]) -> list[Arrival]:
    """Evenly over the beginning, long prompts and others each, so that long ones do not come together."""
    spread: list[Arrival] = []
    for is_long in (False, True):
        some = [one for one in begun if (one.prompt_tokens > 2 * SHORT_PROMPT[2]) == is_long]
        spread += [replace(one, at_s=BEGINNING_S * (index + 0.5) / len(some)) for index, one in enumerate(some)]
    return spread
