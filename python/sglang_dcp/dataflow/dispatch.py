"""Moves rows between instances: queries and K/V to the shards, partial results home."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sglang_dcp.dataflow.contracts import PartialState, StepPlan
from sglang_dcp.dataflow.transport.base import Transport


@dataclass(frozen=True)
class Received:
    """What came from remote homes, grouped by home: queries [R, heads, qk_head_dim], kv_rows [K, kv_width]."""

    queries: torch.Tensor
    kv_rows: torch.Tensor


def dispatch(queries: torch.Tensor, kv_rows: torch.Tensor, plan: StepPlan, transport: Transport, *, layer: int) -> Received:
    """Sends each query row, and each K/V row whose tail is remote, in one message per destination."""
    query_width, kv_width = queries[0].numel(), kv_rows.shape[1]
    sent_queries = queries[plan.send_queries].reshape(-1, query_width).split(plan.send_query_splits)
    sent_kv = kv_rows[plan.send_kv].split(plan.send_kv_splits)
    message = torch.cat([part.reshape(-1) for pair in zip(sent_queries, sent_kv, strict=True) for part in pair])
    send_splits = _elements(plan.send_query_splits, query_width, plan.send_kv_splits, kv_width)
    receive_splits = _elements(plan.receive_query_splits, query_width, plan.receive_kv_splits, kv_width)
    arrived = transport.all_to_all(message, send_splits, receive_splits, step=plan.step, layer=layer, stage="dispatch")
    got_queries, got_kv = [], []
    for part, num_queries in zip(arrived.split(receive_splits), plan.receive_query_splits, strict=True):
        got_queries.append(part[: num_queries * query_width])
        got_kv.append(part[num_queries * query_width :])
    return Received(torch.cat(got_queries).view(-1, *queries.shape[1:]), torch.cat(got_kv).view(-1, kv_width))


def return_partials(state: PartialState, plan: StepPlan, transport: Transport, *, layer: int, dtype: torch.dtype) -> PartialState:
    """Sends the partials of received queries home, output (in `dtype`) and LSE side by side; returns those of the own queries, in send
    order. The LSE stays float32: where outputs are narrower it travels as several of their words."""
    heads, v_head_dim = state.output.shape[1:]
    guests = slice(plan.num_tokens, plan.num_tokens + plan.num_received)
    lse = state.lse[guests].float().unsqueeze(-1).view(dtype)
    width = v_head_dim + lse.shape[-1]
    message = torch.cat([state.output[guests].to(dtype), lse], dim=-1).reshape(-1)
    send_splits = [count * heads * width for count in plan.receive_query_splits]
    receive_splits = [count * heads * width for count in plan.send_query_splits]
    arrived = transport.all_to_all(message, send_splits, receive_splits, step=plan.step, layer=layer, stage="return")
    rows = arrived.view(-1, heads, width)
    return PartialState(rows[..., :v_head_dim], rows[..., v_head_dim:].contiguous().view(torch.float32).squeeze(-1))


def _elements(first: Sequence[int], first_width: int, second: Sequence[int], second_width: int) -> list[int]:
    return [a * first_width + b * second_width for a, b in zip(first, second, strict=True)]
