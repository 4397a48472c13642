"""Plain-torch oracle of the per-layer path. Slow and obvious on purpose; every fast path is tested against it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sglang_dcp.dataflow.contracts import PartialState
from sglang_dcp.dataflow.merge import merge_partial_states


def partial_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    scale: float,
    query_positions: torch.Tensor | None = None,
    key_positions: torch.Tensor | None = None,
    window: int | None = None,
) -> PartialState:
    """Attention of one request's queries over the keys of one shard, in float32.

    query:  [tokens, heads, qk_head_dim]
    keys:   [num_keys, kv_heads, qk_head_dim]; values: [num_keys, kv_heads, v_head_dim]. heads is a multiple of kv_heads; MLA in
            absorbed form has kv_heads = 1 and values = the latent part of keys.
    query_positions [tokens], key_positions [num_keys]: with both, a query sees the keys at positions <= its own; without, all. window:
    and of those, it sees its own and as many before it.
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
        if window is not None:
            hidden |= key_positions[None, :] < query_positions[:, None] - window
        logits = logits.masked_fill(hidden[:, None, None, :], float("-inf"))
    lse = torch.logsumexp(logits, dim=-1)
    weights = torch.exp(logits - torch.where(lse == float("-inf"), torch.zeros_like(lse), lse).unsqueeze(-1))
    output = torch.einsum("tkgn,nkv->tkgv", weights, values.float())
    return PartialState(output.reshape(tokens, heads, -1).to(query.dtype), lse.reshape(tokens, heads))


@dataclass(frozen=True)
class RouteTables:
    """What the routes of one step mean for one instance. Pairs are (instance, slot there).

    Slots: a shard orders the rows it attends by (home, position in that home's list), its own ones last; a home orders the partial results
    that return to it by (remote shard, position); a tail orders the K/V rows that travel to it by (home, position).
    """

    send: list[list[tuple[int, int]]]  # per home row and shard, ascending: query slot there
    merge: list[list[tuple[int, int]]]  # per home row and shard: return slot here, or the attention row when the shard is this one
    kv_send: list[tuple[int, int] | None]  # per home row: K/V slot at the tail it travels to
    attention: list[tuple[int, int]]  # per attention row: (home, row there)
    give_back: list[tuple[int, int] | None]  # per attention row: return slot at its home; None for own rows
    kv_receive: list[tuple[int, int]]  # per arriving K/V row: (home, row there)


def route_tables(routes: Sequence[Sequence[Sequence[int]]], tails: Sequence[Sequence[int]], rank: int) -> RouteTables:
    """routes[h][m]: shards of row m of home h; tails[h][m]: instance its new K/V travels to, -1 for none."""
    num_instances = len(routes)
    own_last = [[*(h for h in range(num_instances) if h != s), s] for s in range(num_instances)]
    attended = [[(h, m) for h in own_last[s] for m, shards in enumerate(routes[h]) if s in shards] for s in range(num_instances)]
    returned = [
        [(s, m) for s in range(num_instances) if s != h for m, shards in enumerate(routes[h]) if s in shards] for h in range(num_instances)
    ]
    travelling = [[(h, m) for h in range(num_instances) for m, tail in enumerate(tails[h]) if tail == s] for s in range(num_instances)]
    own = list(enumerate(routes[rank]))
    return RouteTables(
        send=[[(s, attended[s].index((rank, m))) for s in sorted(shards)] for m, shards in own],
        merge=[
            [(s, attended[rank].index((rank, m)) if s == rank else returned[rank].index((s, m))) for s in sorted(shards)]
            for m, shards in own
        ],
        kv_send=[None if tail < 0 else (tail, travelling[tail].index((rank, m))) for m, tail in enumerate(tails[rank])],
        attention=attended[rank],
        give_back=[None if h == rank else (h, returned[h].index((rank, m))) for h, m in attended[rank]],
        kv_receive=travelling[rank],
    )


def sharded_attention(
    queries: torch.Tensor, shards: Sequence[Sequence[tuple[torch.Tensor, torch.Tensor]]], *, scale: float
) -> PartialState:
    """Decode attention of home rows whose keys lie on several shards: one partial state per shard, merged.

    queries [rows, heads, qk_head_dim]; shards[row]: (keys, values) of each shard as in `partial_attention`, empty ones included.
    """
    merged = []
    for query, parts in zip(queries, shards, strict=True):
        states = [partial_attention(query[None], keys, values, scale=scale) for keys, values in parts]
        if not states:
            raise ValueError("a home row needs at least one shard (an empty one will do) to know its value size")
        merged.append(merge_partial_states(torch.stack([s.output for s in states]), torch.stack([s.lse for s in states])))
    return PartialState(torch.cat([s.output for s in merged]), torch.cat([s.lse for s in merged]))
