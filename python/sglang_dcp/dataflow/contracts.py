"""The types of the per-layer path in flow order. Torch only; no sglang import.

Every log-sum-exp in this package is a natural logarithm; kernel adapters convert theirs once, where they produce it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
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


@dataclass(frozen=True)
class HomeRow:
    """One request of an instance's own batch in one step, as the plan builder needs it.

    token_start:  first of its tokens among the batch's tokens; num_new tokens at positions prefix_len ...
    page_owners, page_numbers: int64 numpy arrays, one entry per page of the sequence; owner is the instance.
    """

    token_start: int
    num_new: int
    prefix_len: int
    page_owners: np.ndarray
    page_numbers: np.ndarray


@dataclass(frozen=True)
class GuestRow:
    """One remote request in one step, seen from a shard: page_index[i] is the sequence index of page page_numbers[i]."""

    home: int
    num_new: int
    prefix_len: int
    page_index: np.ndarray
    page_numbers: np.ndarray


@dataclass(frozen=True)
class AttentionRow:
    """One (request, shard) pair to compute: queries query_start .. + num_queries of [own tokens, received queries].

    page_numbers:   int64 numpy, this shard's pages of the sequence in order; the row's keys are the first num_keys tokens in them.
    num_unmasked:   leading keys that every query of the row sees (positions before the chunk).
    key_offsets:    int64 [num_keys - num_unmasked]: position of the remaining keys relative to the row's first query.
    """

    query_start: int
    num_queries: int
    page_numbers: np.ndarray
    page_size: int
    num_keys: int
    num_unmasked: int
    key_offsets: torch.Tensor

    @cached_property
    def kv_slots(self) -> torch.Tensor:
        """int64 [num_keys], token slots in this instance's pool, ascending in position."""
        slots = self.page_numbers[:, None] * self.page_size + np.arange(self.page_size)
        return torch.from_numpy(slots.ravel()[: self.num_keys].astype(np.int64))


@dataclass(frozen=True)
class StepPlan:
    """Everything the layers of one step need to know; constant over the layers, known on both sides before they start.

    Lengths are counts of rows; *_splits have one entry per instance. T = own tokens, R = received queries.
    send_queries [sum(send_query_splits)]: own token of each query row sent, grouped by destination.
    send_kv      [sum(send_kv_splits)]:    own token of each K/V row sent, grouped by destination.
    write_tokens, write_slots:             own tokens whose K/V stays here, and their slots.
    receive_kv_slots [sum(receive_kv_splits)]: slots of received K/V rows, grouped by source.
    merge_depth [sum(send_query_splits)]:  1, 2, ...: which of the partials of its token each returned row is (0 is the own one).
    num_partials:                          most partials of one token, the own one included.
    """

    step: int
    num_tokens: int
    send_queries: torch.Tensor
    send_query_splits: tuple[int, ...]
    receive_query_splits: tuple[int, ...]
    send_kv: torch.Tensor
    send_kv_splits: tuple[int, ...]
    receive_kv_splits: tuple[int, ...]
    receive_kv_slots: torch.Tensor
    write_tokens: torch.Tensor
    write_slots: torch.Tensor
    attention_rows: tuple[AttentionRow, ...]
    merge_depth: torch.Tensor
    num_partials: int
    num_guest_rows: int

    @property
    def num_received(self) -> int:
        return sum(self.receive_query_splits)
