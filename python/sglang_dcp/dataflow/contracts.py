"""The types of the per-layer path in flow order. Torch only; no sglang import.

Every log-sum-exp in this package is a natural logarithm; kernel adapters convert theirs once, where they produce it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class PartialState:
    """Attention of some queries over a part of their keys.

    output: [..., heads, v_head_dim], normalised over the part that was seen.
    lse:    [..., heads], float32, natural log of the sum of exp(scaled logits) over that part.
    A query that saw no key is the *neutral* state: lse = -inf and output = 0.
    """

    output: torch.Tensor
    lse: torch.Tensor

    def __post_init__(self) -> None:
        if self.output.shape[:-1] != self.lse.shape:
            raise ValueError(f"partial state: output {tuple(self.output.shape)} does not match lse {tuple(self.lse.shape)}")

    @staticmethod
    def neutral(*shape: int, v_head_dim: int, dtype: torch.dtype, device: torch.device | str) -> PartialState:
        """A neutral state of leading shape `shape` (heads last)."""
        return PartialState(
            torch.zeros(*shape, v_head_dim, dtype=dtype, device=device),
            torch.full(shape, float("-inf"), dtype=torch.float32, device=device),
        )
