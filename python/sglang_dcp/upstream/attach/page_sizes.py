"""Sizes in tokens that are whole pages: the page itself where nobody names one, and the chunks of a prefill."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from sglang_dcp.upstream.attach.widths import SettingError

logger = logging.getLogger(__name__)

PAGE_SIZES = {"cpu": 16, "cuda": 64}
"""Tokens per page where the user names none, by device: SGLang would take 1, and the ledger needs whole pages."""


def complete_page_size(values: Callable[[str], Any]) -> dict[str, int]:
    """A page size where neither the user nor the attention backend (flashmla: 64) gave one. Other devices are refused later."""
    device = values("device")
    if values("page_size") is not None or device not in PAGE_SIZES:
        return {}
    logger.info("dyncp: --page-size %d (the ledger works in pages of at least 2 tokens)", PAGE_SIZES[device])
    return {"page_size": PAGE_SIZES[device]}


def complete_chunk_size(given: int | None, values: Callable[[str], Any]) -> dict[str, int]:
    """Chunks of whole pages where SGLang's division of --chunked-prefill-size by the instances leaves others: it would end with an
    assertion of its own, which nobody meets whose page is one token.

    given: tokens of all instances together, before the division; `values(field)`: settings behind it. Raises SettingError where an
    instance's chunk is shorter than a page.
    """
    chunk, page_size, instances = values("chunked_prefill_size"), values("page_size"), values("attn_dp_size")
    if given is None or given <= 0 or not page_size or values("disaggregation_mode") == "decode" or (chunk and chunk % page_size == 0):
        return {}
    whole = chunk // page_size * page_size
    if not whole:
        raise SettingError(
            f"--chunked-prefill-size {given} does not work with --enable-dyncp: {chunk} tokens for each of {instances} instances are less "
            f"than a page (--page-size {page_size}); give at least {instances * page_size}"
        )
    logger.info("dyncp: --chunked-prefill-size %d (%d tokens for each instance, whole pages of %d)", whole * instances, whole, page_size)
    return {"chunked_prefill_size": whole}


def find_chunk_refusal(values: Callable[[str], Any], *, sharded: bool) -> str | None:
    """The message for a server that would prefill whole prompts in one step, or None. `values(field)`: as resolved.

    SGLang sizes a step's input buffers by the pool where no chunk bounds them: a prompt that lies in several pools would not fit them.
    sharded: whether one may; no policy but `local` keeps every request in one pool.
    """
    chunk = values("chunked_prefill_size")
    if not sharded or values("disaggregation_mode") == "decode" or (chunk is not None and chunk > 0):
        return None
    return (
        f"--chunked-prefill-size {chunk} works with --dyncp-policy local only: a prompt longer than one KV pool is prefilled in chunks; "
        "give those of all instances together, in tokens"
    )
