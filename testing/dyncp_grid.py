"""The fixed grid of servers that the runtime tests share: starting one costs a minute."""

from __future__ import annotations

import random
from dataclasses import dataclass

from testing.recall import RecallPrompt, recall_prompt
from testing.server import ServerConfig

POOL_TOKENS = 1024
INSTANCES = 4
CHECK = (
    ("SGLANG_DYNCP_CHECK_EVERY_STEP", "1"),
    ("SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY", "1"),
    ("SGLANG_CHECK_KV_PAGE_INVARIANTS", "1"),
)
"""Our page audit before every step, and SGLang's own leak and page checks; each ends the server when it fails."""

MLA_GRID = [("deepseek_v2", 64, 256), ("deepseek_v2", 16, 64), ("deepseek_v2", 16, 256)]
"""Every page size and every chunk; for the fourth stands a server of two process trees (test_several_nodes)."""
GRID = [*(("qwen3moe", page, chunk) for page in (64, 16) for chunk in (64, 256)), *MLA_GRID]

GROWING: list[tuple[RecallPrompt, int]] = [
    (recall_prompt(60, 0.3, 1), 640),
    (recall_prompt(100, 0.6, 2), 300),
    (recall_prompt(200, 0.1, 3), 330),
]
"""Prompts that outgrow a pool of 256 tokens, with their numbers of output tokens."""


def grid_server(model: str, page_size: int, chunk_tokens: int) -> ServerConfig:
    return ServerConfig(
        model=model,
        instances=INSTANCES,
        pool_tokens=POOL_TOKENS,
        page_size=page_size,
        chunk_tokens=chunk_tokens,
        dyncp=True,
        flags=("--enable-metrics",),
        environment=CHECK,
    )


def small_pool_server(pool_tokens: int, *flags: str) -> ServerConfig:
    """Pools that a short output outgrows."""
    return ServerConfig(
        model="qwen3moe",
        instances=INSTANCES,
        pool_tokens=pool_tokens,
        page_size=16,
        chunk_tokens=64,
        dyncp=True,
        flags=("--enable-metrics", *flags),
        environment=CHECK,
    )


def stock_server(model: str) -> ServerConfig:
    """Stock SGLang, one instance, one large pool: the reference."""
    return ServerConfig(model=model, instances=1, pool_tokens=8192, page_size=16, chunk_tokens=256)


@dataclass(frozen=True)
class PinnedPrompt:
    """A prompt with the placement that the exactness tests pin it to."""

    text: str
    degree: int
    home: int
    max_new_tokens: int


def random_prompts(count: int, seed: int) -> list[PinnedPrompt]:
    """Lengths from one page per shard to more than a pool holds; sixteen in a row have each degree at each home, eight each home twice."""
    rng, prompts = random.Random(seed), []
    for index in range(count):
        degree, home = 1 + index % INSTANCES, (index + index // INSTANCES) % INSTANCES
        longest = POOL_TOKENS - 64 if degree == 1 else 1800
        length = int(64 * degree * (longest / (64 * degree)) ** (rng.random() ** 1.5))
        prompt = recall_prompt(length, rng.random(), seed + index, scatter=index % 3 == 0)
        prompts.append(PinnedPrompt(prompt.text, degree, home, 4 + index % 9))
    return prompts


PROMPTS = random_prompts(32, seed=20261128)
"""What the exactness tests ask."""
