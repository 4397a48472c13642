"""Partial attention of a step's rows in plain torch: the CPU path, and float32 on a GPU. CUDA adapters sit beside it and return the same
type."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from sglang_dcp.dataflow.contracts import NO_SCALES, AttentionRow, KVScales, PartialState
from sglang_dcp.dataflow.device_plan import to_device


class PartialAttention(Protocol):
    """Computes a step's attention rows (at least one, all causal or none) in one layer.

    queries [q, heads, qk_head_dim] of the rows, one row after the other, contiguous; keys [slots, kv_heads, qk_head_dim]; values
    [slots, kv_heads, v_head_dim]; kv_scales: of a quantised pool. Returns a contiguous state of leading shape [q, heads], in `out` where
    that is given (output in any element type, LSE float32); it belongs to the caller.
    """

    def __call__(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        rows: Sequence[AttentionRow],
        scale: float,
        out: PartialState | None = None,
        *,
        kv_scales: KVScales = NO_SCALES,
    ) -> PartialState: ...


def torch_partial_attention(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    rows: Sequence[AttentionRow],
    scale: float,
    out: PartialState | None = None,
    *,
    kv_scales: KVScales = NO_SCALES,
) -> PartialState:
    """One row after the other, float32."""
    num_queries, heads, _ = queries.shape
    if out is None:
        out = PartialState.neutral(num_queries, heads, v_head_dim=values.shape[-1], dtype=torch.float32, device=queries.device)
    start = 0
    for row in rows:
        span = slice(start, start + row.num_queries)
        slots = to_device(row.kv_slots, keys.device)
        row_keys, row_values = _rows_at(keys, slots), _rows_at(values, slots)
        output, out.lse[span] = _attend(queries[span], row_keys, row_values, row, scale * kv_scales.key)
        out.output[span] = output if kv_scales.value == 1.0 else output * kv_scales.value
        start += row.num_queries
    return out


def _rows_at(cache: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """cache[slots]: torch gathers no rows of an 8-bit float."""
    return cache[slots] if cache.itemsize > 1 else cache.view(torch.uint8)[slots].view(cache.dtype)


def _attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, row: AttentionRow, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, heads, _ = query.shape
    kv_heads = keys.shape[1]
    grouped = query.float().view(tokens, kv_heads, heads // kv_heads, -1).permute(1, 2, 0, 3)
    logits = torch.matmul(grouped, keys.float().permute(1, 2, 0).unsqueeze(1)).mul_(scale)
    if row.causal:
        last_seen = torch.arange(tokens, device=query.device)[:, None] + row.num_keys - tokens
        places = torch.arange(row.num_keys, device=query.device)[None, :]
        hidden = places > last_seen
        if row.window is not None:
            hidden |= places < last_seen - row.window
        logits.masked_fill_(hidden, float("-inf"))
    lse = torch.logsumexp(logits, dim=-1)
    weights = logits.sub_(torch.where(lse == float("-inf"), 0.0, lse).unsqueeze(-1)).exp_()
    output = torch.matmul(weights, values.float().permute(1, 0, 2).unsqueeze(1))
    return output.permute(2, 0, 1, 3).reshape(tokens, heads, -1), lse.permute(2, 0, 1).reshape(tokens, heads)
