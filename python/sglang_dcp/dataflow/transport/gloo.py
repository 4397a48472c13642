"""Exchange over a gloo process group: the CPU transport, and the plain baseline for the others."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from sglang_dcp.dataflow.transport.base import TransportError


class GlooTransport:
    """Wraps a gloo group of all instances, made by `create_gloo_group`."""

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
            raise TransportError(f"rank {self._rank}, step {step}, layer {layer}, {stage}: peers did not answer ({error})") from error
        return arrived


def create_gloo_group(timeout_seconds: float) -> dist.ProcessGroup:
    """A gloo group of all ranks. Every rank must call it. A wait longer than the timeout raises TransportError."""
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds))
    assert isinstance(group, dist.ProcessGroup), "this rank is in the group of all ranks"
    return group
