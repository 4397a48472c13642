"""Moves rows between instances: queries and K/V to the shards, partial results home.

A message of the dispatch holds, per destination, each kind of row whole: queries, keys, values. One that returns holds rows of an output
and its LSE. So what arrived is read where it lies.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sglang_dcp.dataflow.contracts import NewKV, PartialState, StepPlan, TokenList
from sglang_dcp.dataflow.transport.base import Transport


@dataclass(frozen=True)
class Received:
    """What came from remote homes: queries [R, heads, qk_head_dim] grouped by home, K/V rows per home."""

    queries: torch.Tensor
    new_kv: tuple[NewKV, ...]


def dispatch(queries: torch.Tensor, new_kv: NewKV, plan: StepPlan, transport: Transport, *, layer: int) -> Received:
    """Sends each query row, and each K/V row whose page is remote, in one message per destination. Quantised K/V travels as words of the
    queries' type."""
    stored = new_kv.stored
    travelling = [rows.view(queries.dtype) for rows in stored.travelling]
    pieces: list[tuple[TokenList, torch.Tensor]] = []
    send_splits = []
    for asked, written in zip(plan.send_queries, plan.send_kv, strict=True):
        group = [(asked, queries), *((written, rows) for rows in travelling)]
        pieces += [piece for piece in group if len(piece[0])]
        send_splits.append(sum(len(tokens) * rows[0].numel() for tokens, rows in group))
    query_width, kv_widths = queries[0].numel(), [rows[0].numel() for rows in travelling]
    receive_splits = [
        num_queries * query_width + slots.numel() * sum(kv_widths)
        for num_queries, slots in zip(plan.receive_query_splits, plan.receive_kv_slots, strict=True)
    ]
    message = _message(pieces, sum(send_splits), queries)
    arrived = transport.all_to_all(message, send_splits, receive_splits, step=plan.step, layer=layer, stage="dispatch")
    got_queries, got_kv = [], []
    for part, num_queries, slots in zip(arrived.split(receive_splits), plan.receive_query_splits, plan.receive_kv_slots, strict=True):
        asked_rows, *written_rows = part.split([num_queries * query_width, *(slots.numel() * width for width in kv_widths)])
        got_queries += [asked_rows.view(-1, *queries.shape[1:])] if num_queries else []
        words = (rows.view(-1, *sent.shape[1:]) for rows, sent in zip(written_rows, travelling, strict=True))
        keys, *rest = (rows.view(stored.keys.dtype) for rows in words)
        values = keys[..., : stored.values.shape[-1]] if stored.latent else rest[0]
        got_kv.append(NewKV(keys, values, stored.latent))
    return Received(joined(got_queries, queries), tuple(got_kv))


def return_partials(state: PartialState, plan: StepPlan, transport: Transport, *, layer: int, dtype: torch.dtype) -> PartialState:
    """Sends the partials of the received queries, `state`, home; returns those of the own queries, ordered by shard.

    Outputs travel in `dtype`.
    """
    heads, v_head_dim = state.output.shape[1:]
    width = partial_width(heads, v_head_dim, dtype)
    message = torch.empty(plan.num_received, width, dtype=dtype, device=state.output.device)
    sent = partials_in(message, heads, v_head_dim)
    sent.output.copy_(state.output)
    sent.lse.copy_(state.lse)
    send_splits = [count * width for count in plan.receive_query_splits]
    receive_splits = [len(tokens) * width for tokens in plan.send_queries]
    arrived = transport.all_to_all(message.view(-1), send_splits, receive_splits, step=plan.step, layer=layer, stage="return")
    return partials_in(arrived.view(-1, width), heads, v_head_dim)


def partial_width(heads: int, v_head_dim: int, dtype: torch.dtype) -> int:
    """Elements of a row that carries one query's partial. The LSE stays float32: in narrower rows it takes several elements."""
    return heads * (v_head_dim + torch.float32.itemsize // dtype.itemsize)


def partials_in(rows: torch.Tensor, heads: int, v_head_dim: int) -> PartialState:
    """The partials that `rows` [R, partial_width] hold, where they lie: a query's output, then its LSE."""
    output = rows[:, : heads * v_head_dim].unflatten(1, (heads, v_head_dim))
    return PartialState(output, rows.view(torch.float32)[:, -heads:])


def joined(parts: list[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    """Rows of all parts. A single part is not copied."""
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts) if parts else like[:0]


def _message(pieces: list[tuple[TokenList, torch.Tensor]], num_elements: int, like: torch.Tensor) -> torch.Tensor:
    """Rows of all pieces, one after the other: a single run is sent from where it lies."""
    if len(pieces) == 1 and pieces[0][0].first is not None:
        return pieces[0][0].take(pieces[0][1]).reshape(-1)
    message = like.new_empty(num_elements)
    first = 0
    for tokens, rows in pieces:
        size = len(tokens) * rows[0].numel()
        tokens.take_into(rows, message[first : first + size].view(-1, *rows.shape[1:]))
        first += size
    return message
