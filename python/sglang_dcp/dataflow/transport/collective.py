"""Exchange over a process group of torch.distributed, whatever its backend."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import ClassVar

import torch
import torch.distributed as dist

from sglang_dcp.dataflow.transport.base import TransportError


class CollectiveTransport:
    """Wraps a group that `create_group` made. `failure` says what an error of the backend means."""

    failure: ClassVar[str]

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._rank = dist.get_rank()

    def all_to_all(
        self, message: torch.Tensor, send_splits: Sequence[int], receive_splits: Sequence[int], *, step: int, layer: int, stage: str
    ) -> torch.Tensor:
        arrived = message.new_empty(sum(receive_splits))
        try:
            dist.all_to_all_single(arrived, message.contiguous(), list(receive_splits), list(send_splits), group=self._group)
        except RuntimeError as error:
            raise TransportError(f"rank {self._rank}, step {step}, layer {layer}, {stage}: {self.failure} ({error})") from error
        return arrived


def create_group(backend: str, timeout_seconds: float, groups: Sequence[range]) -> dist.ProcessGroup:
    """Process groups of these ranks, apart from those of SGLang's collectives; returns this rank's. Every rank must call it, with the same
    groups, of which each rank is in one."""
    timeout, own = timedelta(seconds=timeout_seconds), None
    for ranks in groups:
        made = dist.new_group(list(ranks), backend=backend, timeout=timeout)
        own = made if dist.get_rank() in ranks else own
    assert isinstance(own, dist.ProcessGroup), f"rank {dist.get_rank()} is in none of {groups}"
    return own
