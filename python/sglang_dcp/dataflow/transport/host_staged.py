"""Device messages over a host transport: copied to the host, exchanged there, copied back. Slow, and free of any GPU library."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sglang_dcp.dataflow.transport.base import Transport


class HostStagedTransport:
    """Wraps a transport of host tensors. Every call waits for the device. Bytes travel, so any element type does."""

    def __init__(self, host: Transport) -> None:
        self._host = host

    def all_to_all(
        self, message: torch.Tensor, send_splits: Sequence[int], receive_splits: Sequence[int], *, step: int, layer: int, stage: str
    ) -> torch.Tensor:
        size = message.element_size()
        staged = message.contiguous().view(torch.uint8).cpu()
        sent, received = ([count * size for count in splits] for splits in (send_splits, receive_splits))
        arrived = self._host.all_to_all(staged, sent, received, step=step, layer=layer, stage=stage)
        return arrived.to(message.device).view(message.dtype)
