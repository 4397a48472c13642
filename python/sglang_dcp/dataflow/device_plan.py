"""A step's plan on the device that runs its layers: every index list in one copy."""

from __future__ import annotations

import dataclasses

import torch

from sglang_dcp.dataflow.contracts import StepPlan


def to_device(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A host tensor on `device`, without waiting for it: through pinned memory, which torch keeps until the copy has ended."""
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)


INDEX_FIELDS = ("send_queries", "send_kv", "write_tokens", "write_slots", "receive_kv_slots", "merge_depth")


def plan_on_device(plan: StepPlan, device: torch.device) -> StepPlan:
    """The same plan with its index lists on `device`. Attention rows stay on the host, where their kernels are planned."""
    if device.type == "cpu":
        return plan
    lists = [getattr(plan, name) for name in INDEX_FIELDS]
    together = to_device(torch.cat(lists), device)
    parts = together.split([part.numel() for part in lists])
    return dataclasses.replace(plan, **dict(zip(INDEX_FIELDS, parts, strict=True)))
