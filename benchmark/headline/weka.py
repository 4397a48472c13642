"""Lengths of coding agents' requests, as few enough numbers to stand here: the simulator reads the traces themselves.

Source: callanjfox/kv-cache-tester, traces/trace_NNNN.json at commit c9b3da54fc2f555942720527b86c1979fcae9bb2 (Apache-2.0): Claude Code
sessions captured by a proxy at WEKA. Quantiles of input_length and output_length over 30,975 requests of 483 sessions, the part in
`weka_claude_code_dev.parquet` (its README says what is absent). The two are drawn apart from each other, as are the requests of a session.
"""

from __future__ import annotations

import numpy as np

from benchmark.simulate.workloads import Requests, Workload

SHARES = (0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.98, 0.99, 0.995, 1.0)
PROMPTS = (6343, 15471, 28737, 40206, 63864, 98499, 134278, 198196, 307393, 434551, 494589, 559115, 880502)
OUTPUTS = (1, 57, 86, 102, 137, 217, 421, 891, 1537, 2699, 3818, 5086, 18195)
"""Tokens, by SHARES; between two of them the logarithm is linear."""


def weka_lengths(max_prompt: int) -> Workload:
    """Poisson arrivals with these lengths, prompts cut at `max_prompt`. A longer run begins with the same requests."""

    def make(rate: float, seconds: float, seed: int) -> Requests:
        arrivals, lengths = np.random.default_rng((seed, 7)), np.random.default_rng((seed, 8))
        count = max(1, round(rate * seconds))
        times = np.cumsum(arrivals.standard_exponential(count)) / rate
        drawn = lengths.random((count, 2))
        prompts, outputs = (np.exp(np.interp(drawn[:, i], SHARES, np.log(table))) for i, table in enumerate((PROMPTS, OUTPUTS)))
        prompts = np.minimum(np.round(prompts), max_prompt).astype(np.int64)
        return list(zip(times.tolist(), prompts.tolist(), np.round(outputs).astype(np.int64).tolist(), strict=True))

    return Workload("weka-lengths", make, min(max_prompt, PROMPTS[-1]), OUTPUTS[-1])
