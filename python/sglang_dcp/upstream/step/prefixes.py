"""Which prompts may go on from pages of an earlier one, and the digests by which they find them."""

from __future__ import annotations

from typing import Any

from sglang_dcp.ledger.prefix_index import page_digests
from sglang_dcp.upstream.step.queued import behind_prefill_servers
from sglang_dcp.upstream.step.runtime import Runtime


def is_on(runtime: Runtime) -> bool:
    """--disable-radix-cache is SGLang's word for no prefix cache at all. On a decode server it says so itself, of its tree alone."""
    scheduler = runtime.scheduler
    return runtime.participant.most_retained > 0 and (
        behind_prefill_servers(scheduler) or not getattr(scheduler.tree_cache, "disable", False)
    )


def namespace_of(req: Any) -> tuple[str | None, str | None]:
    """The client's own; `extra_key` is replaced when a request is kept out of SGLang's tree."""
    return req.dyncp_extra_key, req.cache_salt


def is_plain(req: Any) -> bool:
    """Whether token ids tell all that the K/V of a request follow from."""
    return req.input_embeds is None and req.positional_embed_overrides is None and req.multimodal_inputs is None and req.session is None


def protect_borrowed(req: Any, page_size: int) -> None:
    """Keeps SGLang from freeing what a managed request reads of others: by its count only what is behind is the request's own."""
    req.kv.cache_protected_len = req.dyncp.num_borrowed * page_size


def digests_of(runtime: Runtime, req: Any, num_tokens: int | None = None) -> bytes:
    """Of the whole pages of a request's first num_tokens tokens; of its prompt at least where that is not said. It is asked for in every
    round while requests wait: the tokens are gone through once."""
    known = getattr(req, "dyncp_digested_tokens", None)
    if known is None or (num_tokens is not None and known != num_tokens):
        tokens = req.origin_input_ids + req.output_ids
        req.dyncp_digests = page_digests(tokens, runtime.participant.page_size, namespace_of(req))
        req.dyncp_digested_tokens = len(tokens)
    return req.dyncp_digests
