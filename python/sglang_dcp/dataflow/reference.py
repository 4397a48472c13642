"""Plain-torch oracle of the per-layer path. Slow and obvious on purpose; every fast path is tested against it."""

from __future__ import annotations

import torch

from sglang_dcp.dataflow.contracts import PartialState


def partial_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    scale: float,
    query_positions: torch.Tensor | None = None,
    key_positions: torch.Tensor | None = None,
) -> PartialState:
    """Attention of one request's queries over the keys of one shard, in float32.

    query:  [tokens, heads, qk_head_dim]
    keys:   [num_keys, kv_heads, qk_head_dim]; values: [num_keys, kv_heads, v_head_dim]. heads is a multiple of kv_heads; MLA in
            absorbed form has kv_heads = 1 and values = the latent part of keys.
    query_positions [tokens], key_positions [num_keys]: with both, a query sees the keys at positions <= its own; without, all.
    Returns output [tokens, heads, v_head_dim] in query's dtype and lse [tokens, heads].
    """
    tokens, heads, _ = query.shape
    num_keys, kv_heads, _ = keys.shape
    group = heads // kv_heads
    if num_keys == 0:
        return PartialState.neutral(tokens, heads, v_head_dim=values.shape[-1], dtype=query.dtype, device=query.device)
    grouped = query.float().view(tokens, kv_heads, group, -1)
    logits = torch.einsum("tkgd,nkd->tkgn", grouped, keys.float()) * scale
    if query_positions is not None and key_positions is not None:
        hidden = key_positions[None, :] > query_positions[:, None]
        logits = logits.masked_fill(hidden[:, None, None, :], float("-inf"))
    lse = torch.logsumexp(logits, dim=-1)
    weights = torch.exp(logits - torch.where(lse == float("-inf"), torch.zeros_like(lse), lse).unsqueeze(-1))
    output = torch.einsum("tkgn,nkv->tkgv", weights, values.float())
    return PartialState(output.reshape(tokens, heads, -1).to(query.dtype), lse.reshape(tokens, heads))
