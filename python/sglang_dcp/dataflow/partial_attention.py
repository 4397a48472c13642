"""Partial attention of a step's rows in plain torch: the CPU path, and float32 on a GPU. CUDA adapters sit beside it and return the same
type."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from sglang_dcp.dataflow.contracts import AttentionRow, PartialState
from sglang_dcp.dataflow.device_plan import to_device


class PartialAttention(Protocol):
    """Computes every attention row of a step in one layer.

    queries [T + R, heads, qk_head_dim]; keys [slots, kv_heads, qk_head_dim]; values [slots, kv_heads, v_head_dim].
    Returns a state of leading shape [T + R, heads]; queries that no row covers are neutral.
    """

    def __call__(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, rows: Sequence[AttentionRow], scale: float
    ) -> PartialState: ...


def torch_partial_attention(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, rows: Sequence[AttentionRow], scale: float
) -> PartialState:
    """One row after the other, float32."""
    num_queries, heads, _ = queries.shape
    state = PartialState.neutral(num_queries, heads, v_head_dim=values.shape[-1], dtype=torch.float32, device=queries.device)
    for row in rows:
        if row.kv_slots.numel() == 0:
            continue
        span = slice(row.query_start, row.query_start + row.num_queries)
        slots = to_device(row.kv_slots, keys.device)
        output, lse = _attend(queries[span], keys[slots], values[slots], row, scale)
        state.output[span] = output
        state.lse[span] = lse
    return state


def _attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, row: AttentionRow, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, heads, _ = query.shape
    kv_heads = keys.shape[1]
    grouped = query.float().view(tokens, kv_heads, heads // kv_heads, -1).permute(1, 2, 0, 3)
    logits = torch.matmul(grouped, keys.float().permute(1, 2, 0).unsqueeze(1)).mul_(scale)
    if row.key_offsets.numel():
        hidden = to_device(row.key_offsets, query.device)[None, :] > torch.arange(tokens, device=query.device)[:, None]
        logits[..., row.num_unmasked :].masked_fill_(hidden, float("-inf"))
    lse = torch.logsumexp(logits, dim=-1)
    weights = logits.sub_(torch.where(lse == float("-inf"), 0.0, lse).unsqueeze(-1)).exp_()
    output = torch.matmul(weights, values.float().permute(1, 0, 2).unsqueeze(1))
    return output.permute(2, 0, 1, 3).reshape(tokens, heads, -1), lse.permute(2, 0, 1).reshape(tokens, heads)
