"""Exchange over a NCCL process group: the baseline of the GPU transports, and the one that reaches across nodes.

Sends and receives of a call form one NCCL group, ordered with the current stream on both sides; the host does not wait. A peer that
never comes is noticed by NCCL's watchdog, which ends the process after the group's timeout; the control messages of the next step
(gloo) time out beside it and name the rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from sglang_dcp.dataflow.transport.base import TransportError


class NcclTransport:
    """Wraps a NCCL group of all instances, made by `create_nccl_group`. Messages are device tensors."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._rank = dist.get_rank(group)

    def all_to_all(
        self, message: torch.Tensor, send_splits: Sequence[int], receive_splits: Sequence[int], *, step: int, layer: int, stage: str
    ) -> torch.Tensor:
        arrived = message.new_empty(sum(receive_splits))
        try:
            dist.all_to_all_single(arrived, message.contiguous(), list(receive_splits), list(send_splits), group=self._group)
        except RuntimeError as error:
            raise TransportError(f"rank {self._rank}, step {step}, layer {layer}, {stage}: NCCL failed ({error})") from error
        return arrived


def create_nccl_group(timeout_seconds: float) -> dist.ProcessGroup:
    """A NCCL group of all ranks, apart from those of SGLang's collectives. Every rank must call it."""
    group = dist.new_group(backend="nccl", timeout=timedelta(seconds=timeout_seconds))
    assert isinstance(group, dist.ProcessGroup), "this rank is in the group of all ranks"
    return group
