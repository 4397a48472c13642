"""A step's plan on the device that runs its layers: every index list in one copy."""

from __future__ import annotations

import dataclasses

import torch

from sglang_dcp.dataflow.contracts import StepPlan

INDEX_FIELDS = ("send_queries", "send_kv", "write_tokens", "write_slots", "receive_kv_slots", "merge_depth")


def plan_on_device(plan: StepPlan, device: torch.device) -> StepPlan:
    """The same plan with its index lists on `device`. Attention rows stay on the host, where their kernels are planned.

    Does not wait for the device: the lists go through pinned memory, which torch keeps until the copy has ended.
    """
    if device.type == "cpu":
        return plan
    lists = [getattr(plan, name) for name in INDEX_FIELDS]
    together = torch.cat(lists).pin_memory().to(device, non_blocking=True)
    parts = together.split([part.numel() for part in lists])
    return dataclasses.replace(plan, **dict(zip(INDEX_FIELDS, parts, strict=True)))
