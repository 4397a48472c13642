"""Token ids of a step's new tokens: requests of the ledger take those of their own pages, the others SGLang's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from sglang_dcp.ledger.positions import token_id, token_ids
from sglang_dcp.upstream.step.attached import around
from sglang_dcp.upstream.step.managed import is_managed
from sglang_dcp.upstream.step.runtime import Runtime


@around
def alloc_extend(runtime: Runtime, original: Callable[..., Any], tree_cache: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    """AROUND alloc_paged_token_slots_extend: managed requests take the token ids of their reserved pages, the others the stock path."""
    call = _bind_arguments(original, tree_cache, *args, **kwargs)
    batch = call["batch"]
    if batch is None or not any(is_managed(req) for req in batch.reqs):
        return original(tree_cache, *args, **kwargs)
    prefix_lens, seq_lens = call["prefix_lens_cpu"].tolist(), call["seq_lens_cpu"].tolist()
    local = [i for i, req in enumerate(batch.reqs) if not is_managed(req)]
    parts: dict[int, torch.Tensor] = {}
    if local:
        counts = [seq_lens[i] - prefix_lens[i] for i in local]
        stock = original(
            **{
                **call,
                **{name: call[name][local] for name in ("prefix_lens", "prefix_lens_cpu", "seq_lens", "seq_lens_cpu", "last_loc")},
                "extend_num_tokens": sum(counts),
                "req_pool_indices": None,
            }
        )
        parts.update(zip(local, stock.split(counts), strict=True))
    for i, req in enumerate(batch.reqs):
        if i not in parts:
            parts[i] = torch.from_numpy(token_ids(runtime.participant.ids, req.dyncp, prefix_lens[i], seq_lens[i])).to(batch.device)
    return torch.cat([parts[i] for i in range(len(batch.reqs))])


def decode_ids(runtime: Runtime, reqs: Sequence[Any], seq_lens: torch.Tensor, last_loc: torch.Tensor) -> torch.Tensor | None:
    """Token ids of a decode step's new tokens, None where stock allocates them. seq_lens: with the new token, on the host.

    Within a page a token follows the last one, wherever the page lies, and stock counts on from the last token's id. So stock allocates
    every step but those in which a managed request begins a page, which is not taken from the pool.
    """
    pool, ids = runtime.pool, runtime.participant.ids
    if runtime.own_batch.is_quiet(reqs):
        return None
    begin = runtime.own_batch.beginning_page(reqs, seq_lens)
    told = [(i, token_id(ids, reqs[i].dyncp, reqs[i].kv.kv_allocated_len)) for i in begin if is_managed(reqs[i])]
    return pool.alloc_decode_beside(last_loc, told, [i for i in begin if not is_managed(reqs[i])]) if told else None


def _bind_arguments(original: Callable[..., Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
    import inspect

    bound = inspect.signature(original).bind(*args, **kwargs)
    bound.apply_defaults()
    return dict(bound.arguments)
