"""How much output a request is expected to have: one estimate for placement and admission, so that what the one finds room for the other
lets in."""

from __future__ import annotations

EXPECTED_NEW_TOKENS = 256
"""No policy knows the true length. A request that runs past it, and past its pool, grows on another instance."""


def expected_new_tokens(max_new_tokens: int, largest_degree: int) -> int:
    """Tokens to count for an output that may have `max_new_tokens` (more). All of them where one pool must hold the request
    (largest_degree 1): there it cannot grow elsewhere."""
    return max_new_tokens if largest_degree == 1 else min(EXPECTED_NEW_TOKENS, max_new_tokens)
