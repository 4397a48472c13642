"""Which peers missed a wait, told step by step: the exchange's mask is copied behind a step's layers and read before its result is used."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

IN_FLIGHT = 4
"""Steps whose notes are kept. Overlap scheduling has two whose result is outstanding: the one that runs and the one before."""


@dataclass(frozen=True)
class SilenceNote:
    """The mask as a step's layers left it. To be read when their stream has come to the copy, within IN_FLIGHT steps."""

    step: int
    word: np.ndarray

    def silent(self) -> list[int]:
        """Peers that did not answer in this step, or in one before it."""
        mask = int(self.word[0])
        return [peer for peer in range(mask.bit_length()) if mask >> peer & 1]


class SilenceLog:
    """Notes of an instance's steps. mask: int32 [1], a bit per peer, where the exchange's kernels set it and never clear it."""

    def __init__(self, mask: torch.Tensor) -> None:
        self._mask = mask
        words = torch.zeros(IN_FLIGHT, 1, dtype=torch.int32, pin_memory=mask.is_cuda)
        self._words = [(word, word.numpy()) for word in words]
        self._next = 0

    def note(self, step: int) -> SilenceNote:
        """Called behind the step's last layer, on the layers' stream and outside the graph: every step has a word of its own."""
        word, seen = self._words[self._next]
        self._next = (self._next + 1) % IN_FLIGHT
        word.copy_(self._mask, non_blocking=True)
        return SilenceNote(step, seen)
