"""A step's plan on the device that runs its layers: every index list in one copy."""

from __future__ import annotations

import dataclasses

import torch

from sglang_dcp.dataflow.contracts import MergeList, StepPlan, TokenList


def to_device(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A host tensor on `device`, without waiting for it: through pinned memory, which torch keeps until the copy has ended."""
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)


def plan_on_device(plan: StepPlan, device: torch.device) -> StepPlan:
    """The same plan with its index lists on `device`. Attention rows stay on the host, where their kernels are planned."""
    if device.type == "cpu":
        return plan
    lists = index_lists(plan)
    moved = iter(to_device(torch.cat(lists), device).split([part.numel() for part in lists]))

    def move(tokens: TokenList) -> TokenList:
        return TokenList(next(moved), tokens.first)

    # In the order of index_lists.
    return dataclasses.replace(
        plan,
        send_queries=tuple(map(move, plan.send_queries)),
        send_kv=tuple(map(move, plan.send_kv)),
        pool_tokens=move(plan.pool_tokens),
        chunk_tokens=move(plan.chunk_tokens),
        merges=MergeList(*(next(moved) for _ in plan.merges.index_lists)),
        receive_kv_slots=tuple(next(moved) for _ in plan.receive_kv_slots),
        write_slots=next(moved),
    )


def index_lists(plan: StepPlan) -> list[torch.Tensor]:
    token_lists = [*plan.send_queries, *plan.send_kv, plan.pool_tokens, plan.chunk_tokens]
    return [*(tokens.index for tokens in token_lists), *plan.merges.index_lists, *plan.receive_kv_slots, plan.write_slots]
