"""One attention layer of one step: where to start reading the device's half (upstream/step/driver.py is the host's).

dispatch queries and K/V whose pages are remote -> write K/V -> partial attention -> return partials -> merge at home.
"""

from __future__ import annotations

from typing import Protocol

import torch

from sglang_dcp.dataflow.attention.partial_attention import PartialAttention
from sglang_dcp.dataflow.contracts import NO_SCALES, KVScales, NewKV, PartialState, StepPlan
from sglang_dcp.dataflow.dispatch import dispatch, joined, return_partials
from sglang_dcp.dataflow.merge import add_sinks, merge_into
from sglang_dcp.dataflow.transport.base import Transport


class LayerCache(Protocol):
    """K/V of one layer in this instance's pool. Slot 0 lies in the padding page: what is written there is never read."""

    def write(self, slots: torch.Tensor, new_kv: NewKV) -> None: ...

    def keys_and_values(self) -> tuple[torch.Tensor, torch.Tensor]:
        """keys [slots, kv_heads, qk_head_dim], values [slots, kv_heads, v_head_dim], in the pool's element type."""
        ...


def attention_step(
    queries: torch.Tensor,
    new_kv: NewKV,
    plan: StepPlan,
    cache: LayerCache,
    partial_attention: PartialAttention,
    transport: Transport,
    *,
    scale: float,
    layer: int,
    kv_scales: KVScales = NO_SCALES,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention output [T, heads, v_head_dim] of the instance's own tokens, in queries' dtype.

    queries [T, heads, qk_head_dim] (contiguous) and new_kv: the instance's own tokens. Every instance calls this once per layer, also
    with no token of its own; the layers' calls pair up across instances in order. Tokens that no row covers get zeros. kv_scales: of the
    layer's pool, where it is quantised; a chunk attends its own tokens as they are. sinks [heads]: logits of the layer's attention sinks.
    """
    received = dispatch(queries, new_kv, plan, transport, layer=layer)
    cache.write(plan.write_slots, new_kv.stored)
    for slots, arrived in zip(plan.receive_kv_slots, received.new_kv, strict=True):
        if slots.numel():
            cache.write(slots, arrived)
    merged = attend_chunks(queries, new_kv, plan, partial_attention, scale)
    own, guests = attend_pool(queries, received.queries, plan, cache, partial_attention, scale, kv_scales, like=merged)
    returned = return_partials(guests, plan, transport, layer=layer, dtype=queries.dtype) if plan.anybody_asks else nothing(merged)
    if len(plan.merges):
        merge_into(merged, plan.merges, own, returned)
    if sinks is not None:
        add_sinks(merged, sinks)
    return merged.output


def attend_chunks(queries: torch.Tensor, new_kv: NewKV, plan: StepPlan, partial_attention: PartialAttention, scale: float) -> PartialState:
    """The own tokens over the chunk that each is part of, [T, heads]: what all other partials are merged into."""
    tokens, v_head_dim = plan.chunk_tokens, new_kv.values.shape[-1]
    shape = (plan.num_tokens, queries.shape[1])
    if tokens.first == 0 and len(tokens) == plan.num_tokens:
        state = PartialState(queries.new_empty(*shape, v_head_dim), queries.new_empty(shape, dtype=torch.float32))
    else:
        state = PartialState.neutral(*shape, v_head_dim=v_head_dim, dtype=queries.dtype, device=queries.device)
    if not len(tokens):
        return state
    keys_and_values = new_kv.keys, new_kv.values
    if tokens.first is not None:
        own = slice(tokens.first, tokens.first + len(tokens))
        partial_attention(queries[own], *keys_and_values, plan.chunk_rows, scale, out=PartialState(state.output[own], state.lse[own]))
    else:
        chunks = partial_attention(tokens.take(queries), *keys_and_values, plan.chunk_rows, scale)
        state.output.index_copy_(0, tokens.index, chunks.output.to(state.output.dtype))
        state.lse.index_copy_(0, tokens.index, chunks.lse)
    return state


def attend_pool(
    queries: torch.Tensor,
    received: torch.Tensor,
    plan: StepPlan,
    cache: LayerCache,
    partial_attention: PartialAttention,
    scale: float,
    kv_scales: KVScales,
    *,
    like: PartialState,
) -> tuple[PartialState, PartialState]:
    """Partials of (`pool_tokens`, received queries) over what this instance's pool holds."""
    if not plan.pool_rows:
        return nothing(like), nothing(like)
    asking = [part for part in (plan.pool_tokens.take(queries) if len(plan.pool_tokens) else received[:0], received) if len(part)]
    state = partial_attention(joined(asking, queries), *cache.keys_and_values(), plan.pool_rows, scale, kv_scales=kv_scales)
    count = len(plan.pool_tokens)
    return PartialState(state.output[:count], state.lse[:count]), PartialState(state.output[count:], state.lse[count:])


def nothing(like: PartialState) -> PartialState:
    """Partials of no query."""
    return PartialState(like.output[:0], like.lse[:0])
