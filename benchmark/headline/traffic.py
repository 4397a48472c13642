"""What is sent: the simulator's own mix, so that it can be asked what the same arrivals would meet."""

from __future__ import annotations

from benchmark.headline.client import Arrival
from benchmark.simulate.workloads import chat


def arrivals(long_share: float, rate: float, seconds: float, seed: int, longest: int, longest_output: int = 4096) -> list[Arrival]:
    """The simulator's chat mix with this share of long prompts, none above `longest`, no output above `longest_output`."""
    drawn = chat(long_share, max_prompt=longest).requests(rate, seconds, seed)
    return [Arrival(at, min(prompt, longest), min(longest_output, max(2, output))) for at, prompt, output in drawn]
