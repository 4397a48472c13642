"""Keeps host writes to pinned memory behind the copies that still read it."""

from __future__ import annotations

import torch


class CopyGuard:
    """Orders host writes of a plan behind the copies of the plan before: `with guard:` around each. Nothing to do without a GPU.

    FlashInfer's plan() writes a pinned buffer of its wrapper and starts a copy from there, on the current stream; it does not wait until
    the copy of the plan before was made.
    """

    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event() if device.type == "cuda" else None

    def __enter__(self) -> None:
        if self._event is not None:
            self._event.synchronize()

    def __exit__(self, *error: object) -> None:
        if self._event is not None:
            self._event.record()
