"""Closed loads on servers that stand side by side, taken in turns: time of a decode step with all requests in it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from benchmark.multi_gpu.streams import decode_window, stream
from testing.gpu.answers import pinned, prompt

T_95 = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}
"""Student's t for a two-sided 95 % interval, by number of samples."""


@dataclass(frozen=True)
class Load:
    """home_rows requests on every instance; the first `sharded` of each lie half on the next one. Lengths in tokens.

    spread: outputs are up to this much shorter than new_tokens, evenly, so that requests end one after the other. prompt_spread: prompts
    are up to this much longer than `prompt`, evenly; a page's size makes as many rows begin a page in every step.
    """

    home_rows: int
    sharded: int
    prompt: int
    new_tokens: int
    spread: int = 0
    prompt_spread: int = 0

    def prompt_tokens(self, index: int) -> int:
        return self.prompt + index * self.prompt_spread // self.home_rows

    def output_tokens(self, index: int) -> int:
        return self.new_tokens - index * self.spread // self.home_rows

    def jobs(self, num_instances: int, seed: int, *, dyncp: bool) -> list[tuple[list[int], dict[str, Any], dict[str, Any]]]:
        """(prompt, sampling parameters, further fields) of every request; a stock server is told the rank instead of a pin."""
        jobs = []
        for home in range(num_instances):
            for index in range(self.home_rows):
                ids = prompt(self.prompt_tokens(index), seed * 1_000_003 + home * 1009 + index)
                pin = pinned(2 if index < self.sharded else 1, home)
                jobs.append((ids, pin, {}) if dyncp else (ids, {}, {"routed_dp_rank": home}))
        return jobs


def run_load(client: Any, load: Load, num_instances: int, seed: int, *, dyncp: bool) -> dict[str, float]:
    """decode_window of the load: step_ms while every request decodes."""
    jobs = load.jobs(num_instances, seed, dyncp=dyncp)
    with ThreadPoolExecutor(len(jobs)) as pool:
        lengths = [load.output_tokens(index) for _ in range(num_instances) for index in range(load.home_rows)]
        answers = list(pool.map(lambda job, length: stream(client, job[0], length, job[1], **job[2]), jobs, lengths))
    return decode_window(answers, least_tokens=min(lengths) // 4)


def ratio_interval(ours: Sequence[float], stock: Sequence[float]) -> dict[str, float]:
    """Ratio of paired times with a 95 % interval, from the logarithms of the pairs' ratios."""
    logs = [math.log(a / b) for a, b in zip(ours, stock, strict=True)]
    mean = statistics.mean(logs)
    half = T_95.get(len(logs), 2.3) * statistics.stdev(logs) / math.sqrt(len(logs)) if len(logs) > 1 else float("nan")
    return {"ratio": round(math.exp(mean), 4), "low": round(math.exp(mean - half), 4), "high": round(math.exp(mean + half), 4)}
