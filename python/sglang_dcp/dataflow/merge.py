"""Merge of partial attention results by log-sum-exp: the place where shards become one answer again."""

from __future__ import annotations

import torch

from sglang_dcp.dataflow.contracts import MergeList, PartialState


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


def merge_into(state: PartialState, merges: MergeList, own: PartialState, returned: PartialState) -> None:
    """Merges every other partial of a token into its row of `state`, in place: float32 inside and rounded once, however many shards
    answered. Rows that `merges` does not name are not touched.

    state [T, heads]; own [pool rows, heads], contiguous; returned [returned rows, heads], each row dense. One launch on a GPU.
    """
    if state.output.is_cuda:
        from sglang_dcp.dataflow.merge_kernel import merge_rows

        merge_rows(state, merges, own, returned)
        return
    parts = [_pick(state, merges.tokens), _pick(own, merges.pool_rows)]
    first, counts = merges.begins[:-1], merges.begins.diff()
    for place in range(int(counts.max())):
        rows = torch.full_like(first, -1)
        rows[counts > place] = merges.returned_rows[first[counts > place] + place]
        parts.append(_pick(returned, rows))
    merged = merge_partial_states(torch.stack([part.output.float() for part in parts]), torch.stack([part.lse for part in parts]))
    state.output.index_copy_(0, merges.tokens, merged.output.to(state.output.dtype))
    state.lse.index_copy_(0, merges.tokens, merged.lse)


def add_sinks(state: PartialState, sinks: torch.Tensor) -> None:
    """A sink of logit s is one more key of its head, without a value: it takes its share of the weights, once, when all shards' partials
    are merged. In place; the LSE stays that of the keys. state [T, heads]; sinks [heads]. A query without keys stays zero."""
    share_of_keys = torch.sigmoid(state.lse - sinks.float())
    state.output.mul_(share_of_keys.unsqueeze(-1))


def _pick(state: PartialState, rows: torch.Tensor) -> PartialState:
    """Rows of a state; -1 is a neutral one."""
    heads, v_head_dim = state.output.shape[1:]
    picked = PartialState.neutral(len(rows), heads, v_head_dim=v_head_dim, dtype=state.output.dtype, device=state.output.device)
    there = rows >= 0
    picked.output[there], picked.lse[there] = state.output[rows[there]], state.lse[rows[there]]
    return picked
