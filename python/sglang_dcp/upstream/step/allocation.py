"""Token ids of a step's new tokens: requests of the ledger take those of their own pages, the others SGLang's."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch

from sglang_dcp.upstream.step.binding import current
from sglang_dcp.upstream.step.instance import is_managed


def alloc_extend(original: Callable[..., Any], tree_cache: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    """AROUND alloc_paged_token_slots_extend: managed requests take the token ids of their reserved pages, the others the stock path."""
    call = _bind_arguments(original, tree_cache, *args, **kwargs)
    batch, binding = call["batch"], current()
    if binding is None or batch is None or not any(is_managed(req) for req in batch.reqs):
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
            parts[i] = torch.from_numpy(binding.instance.token_ids(req.dyncp, prefix_lens[i], seq_lens[i])).to(batch.device)
    return torch.cat([parts[i] for i in range(len(batch.reqs))])


def alloc_decode(
    original: Callable[..., Any],
    tree_cache: Any,
    seq_lens: torch.Tensor,
    seq_lens_cpu: torch.Tensor,
    last_loc: torch.Tensor,
    token_per_req: int = 1,
    req_pool_indices: torch.Tensor | None = None,
    batch: Any = None,
) -> torch.Tensor:
    """AROUND alloc_paged_token_slots_decode: a managed request's next page is not taken from the pool.

    Within a page a token follows the last one, wherever the page lies, and stock counts on from the last token's id. So stock allocates
    every step but those in which a managed request begins a page.
    """
    binding = current()
    if binding is None or batch is None:
        return original(tree_cache, seq_lens, seq_lens_cpu, last_loc, token_per_req, req_pool_indices, batch)
    began, instance, reqs = perf_counter(), binding.instance, batch.reqs
    instance.pool.settle_decode_claims()
    begin = binding.own_batch.beginning_page(reqs, seq_lens_cpu)
    told = [(i, instance.token_id(reqs[i].dyncp, reqs[i].kv.kv_allocated_len)) for i in begin if is_managed(reqs[i])]
    ids = instance.pool.alloc_decode_beside(last_loc, told, [i for i in begin if not is_managed(reqs[i])]) if told else None
    binding.host_clock.spent("allocate", perf_counter() - began)
    return original(tree_cache, seq_lens, seq_lens_cpu, last_loc, token_per_req, req_pool_indices, batch) if ids is None else ids


def _bind_arguments(original: Callable[..., Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
    import inspect

    bound = inspect.signature(original).bind(*args, **kwargs)
    bound.apply_defaults()
    return dict(bound.arguments)
