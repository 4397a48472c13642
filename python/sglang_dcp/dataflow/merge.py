"""Merge of partial attention results by log-sum-exp: the place where shards become one answer again."""

from __future__ import annotations

import torch

from sglang_dcp.dataflow.contracts import PartialState, TokenList


def merge_partial_states(outputs: torch.Tensor, lses: torch.Tensor) -> PartialState:
    """Merges `n` partial states of the same queries.

    outputs: [n, ..., heads, v_head_dim]; lses: [n, ..., heads], natural log. Neutral entries (lse -inf) weigh nothing, whatever
    their output holds (NaN included); all-neutral queries stay neutral. Accumulates in float32 and returns outputs' dtype.
    """
    lses = lses.float()
    peak = lses.amax(dim=0)
    safe_peak = torch.where(peak == float("-inf"), torch.zeros_like(peak), peak)
    weights = torch.exp(lses - safe_peak)
    total = weights.sum(dim=0)
    values = torch.where(weights.unsqueeze(-1) > 0, outputs.float(), torch.zeros((), dtype=torch.float32, device=outputs.device))
    merged = (values * weights.unsqueeze(-1)).sum(dim=0) / total.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(-1)
    return PartialState(merged.to(outputs.dtype), torch.log(total) + safe_peak)


def merge_into(state: PartialState, tokens: TokenList, part: PartialState) -> None:
    """Merges `part`, whose rows are `tokens` of `state`, into `state`, in place. Other rows are not touched; no token comes twice.

    state [T, heads], part [len(tokens), heads]; both contiguous. One launch on a GPU; float32 inside.
    """
    if state.output.is_cuda:
        from sglang_dcp.dataflow.merge_kernel import merge_rows

        merge_rows(state, tokens, part)
        return
    outputs = torch.stack([tokens.take(state.output).float(), part.output.float()])
    merged = merge_partial_states(outputs, torch.stack([tokens.take(state.lse), part.lse]))
    state.output.index_copy_(0, tokens.index, merged.output.to(state.output.dtype))
    state.lse.index_copy_(0, tokens.index, merged.lse)
