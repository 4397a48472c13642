"""Exchange over a process group of torch.distributed, whatever its backend."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import ClassVar

import torch
import torch.distributed as dist

from sglang_dcp.dataflow.transport.base import TransportError


class CollectiveTransport:
    """Wraps a group of all instances, made by `create_group`. `failure` says what an error of the backend means."""

    failure: ClassVar[str]

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
            raise TransportError(f"rank {self._rank}, step {step}, layer {layer}, {stage}: {self.failure} ({error})") from error
        return arrived


def create_group(backend: str, timeout_seconds: float) -> dist.ProcessGroup:
    """A group of all ranks, apart from those of SGLang's collectives. Every rank must call it."""
    group = dist.new_group(backend=backend, timeout=timedelta(seconds=timeout_seconds))
    assert isinstance(group, dist.ProcessGroup), "this rank is in the group of all ranks"
    return group
