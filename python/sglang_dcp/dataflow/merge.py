"""Merge of partial attention results by log-sum-exp: the place where shards become one answer again."""

from __future__ import annotations

import torch

from sglang_dcp.dataflow.contracts import PartialState


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
