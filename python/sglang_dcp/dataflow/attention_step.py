"""One attention layer of one step: the place to start reading.

dispatch queries (and K/V rows whose tail is remote) -> write K/V -> partial attention -> return partials -> merge at home.
"""

from __future__ import annotations

from typing import Protocol

import torch

from sglang_dcp.dataflow.contracts import PartialState, StepPlan
from sglang_dcp.dataflow.dispatch import dispatch, return_partials
from sglang_dcp.dataflow.merge import merge_partial_states
from sglang_dcp.dataflow.partial_attention import PartialAttention
from sglang_dcp.dataflow.transport.base import Transport


class LayerCache(Protocol):
    """K/V of one layer in this instance's pool. A K/V row is what travels for one token: [kv_width] elements."""

    def write(self, slots: torch.Tensor, rows: torch.Tensor) -> None: ...

    def keys_and_values(self) -> tuple[torch.Tensor, torch.Tensor]:
        """keys [slots, kv_heads, qk_head_dim], values [slots, kv_heads, v_head_dim]."""
        ...


def attention_step(
    queries: torch.Tensor,
    kv_rows: torch.Tensor,
    plan: StepPlan,
    cache: LayerCache,
    partial_attention: PartialAttention,
    transport: Transport,
    *,
    scale: float,
    layer: int,
) -> torch.Tensor:
    """Attention output [T, heads, v_head_dim] of the instance's own tokens, in queries' dtype.

    queries [T, heads, qk_head_dim], kv_rows [T, kv_width]: the instance's own tokens. Every instance calls this once per layer, also
    with no token of its own; the layers' calls pair up across instances in order. Tokens that no row covers get zeros.
    """
    received = dispatch(queries, kv_rows, plan, transport, layer=layer)
    cache.write(plan.write_slots, kv_rows[plan.write_tokens])
    cache.write(plan.receive_kv_slots, received.kv_rows)
    keys, values = cache.keys_and_values()
    state = partial_attention(torch.cat([queries, received.queries]), keys, values, plan.attention_rows, scale)
    returned = return_partials(state, plan, transport, layer=layer, dtype=queries.dtype)
    return merge_at_home(state, returned, plan).to(queries.dtype)


def merge_at_home(state: PartialState, returned: PartialState, plan: StepPlan) -> torch.Tensor:
    """Merges each own token's local partial with those that came back. [T, heads, v_head_dim], float32."""
    own = PartialState(state.output[: plan.num_tokens], state.lse[: plan.num_tokens])
    if plan.merge_depth.numel() == 0:
        return own.output
    tokens, heads, v_head_dim = own.output.shape
    shape, device = (plan.num_partials, tokens, heads), own.output.device
    stacked = PartialState.neutral(*shape, v_head_dim=v_head_dim, dtype=own.output.dtype, device=device)
    stacked.output[0], stacked.lse[0] = own.output, own.lse
    stacked.output[plan.merge_depth, plan.send_queries] = returned.output.to(own.output.dtype)
    stacked.lse[plan.merge_depth, plan.send_queries] = returned.lse
    return merge_partial_states(stacked.output, stacked.lse).output
