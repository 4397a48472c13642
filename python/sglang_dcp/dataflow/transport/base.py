"""What the data path asks of a transport."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch


class TransportError(RuntimeError):
    """An exchange that failed or timed out; the message names rank, step, layer and stage."""


class Transport(Protocol):
    """Moves flat messages between the instances of an exchange group (Layout.group). Calls pair up across them in order; splits are by
    place in the group."""

    def all_to_all(
        self, message: torch.Tensor, send_splits: Sequence[int], receive_splits: Sequence[int], *, step: int, layer: int, stage: str
    ) -> torch.Tensor:
        """Sends message[sum(send_splits[:d]) : ...] to instance d. Returns what came, grouped by source.

        message: 1-D, sum(send_splits) elements. Raises TransportError when peers do not answer in time.
        """
        ...
