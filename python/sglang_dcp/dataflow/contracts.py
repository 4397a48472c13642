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
    """One request's queries over one list of keys: the first num_keys tokens of `page_numbers`, in order of position.

    The queries of a step's rows follow one another. causal: the queries are the last of the keys, each sees those up to itself; else
    every query sees every key. page_numbers: int64 numpy. There is at least one key. window: of a window layer's row; a causal query sees
    itself and so many keys before it, any other was given no key that it does not see.
    """

    num_queries: int
    page_numbers: np.ndarray
    page_size: int
    num_keys: int
    causal: bool = False
    window: int | None = None

    @cached_property
    def kv_slots(self) -> torch.Tensor:
        """int64 [num_keys], token slots, ascending in position."""
        slots = self.page_numbers[:, None] * self.page_size + np.arange(self.page_size)
        return torch.from_numpy(slots.ravel()[: self.num_keys].astype(np.int64))


@dataclass(frozen=True)
class TokenList:
    """Some of an instance's tokens. Where they follow one another (first is not None) taking them is a view, else a gather by `index`."""

    index: torch.Tensor
    first: int | None

    @staticmethod
    def of(tokens: np.ndarray) -> TokenList:
        is_run = len(tokens) > 0 and int(tokens[-1]) - int(tokens[0]) == len(tokens) - 1 and bool((np.diff(tokens) == 1).all())
        return TokenList(torch.from_numpy(tokens), int(tokens[0]) if is_run else None)

    def __len__(self) -> int:
        return len(self.index)

    def take(self, rows: torch.Tensor) -> torch.Tensor:
        if self.first is not None:
            return rows[self.first : self.first + len(self)]
        return rows.index_select(0, self.index)

    def take_into(self, rows: torch.Tensor, out: torch.Tensor) -> None:
        """One launch; `out` is contiguous."""
        if self.first is not None:
            out.copy_(self.take(rows))
        else:
            torch.index_select(rows, 0, self.index, out=out)


@dataclass(frozen=True)
class MergeList:
    """The own tokens of a step that more is to be merged into than their chunk's partial, and where that is. int64 tensors.

    tokens [U]:        ascending.
    pool_rows [U]:     the token's row among the plan's `pool_tokens`, -1 for none.
    begins [U + 1]:    returned_rows[begins[u]:begins[u + 1]] are the token's rows of what comes back from the shards, in their order.
    returned_rows [R]: each row that comes back, once.
    """

    tokens: torch.Tensor
    pool_rows: torch.Tensor
    begins: torch.Tensor
    returned_rows: torch.Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def index_lists(self) -> tuple[torch.Tensor, ...]:
        """In the order of the fields."""
        return self.tokens, self.pool_rows, self.begins, self.returned_rows


@dataclass(frozen=True)
class NewKV:
    """K/V of some tokens: keys [T, kv_heads, qk_head_dim], values [T, kv_heads, v_head_dim], contiguous.

    latent (MLA in absorbed form): values are the leading elements of keys, which alone travel.
    quantised: the same tokens in the pool's element type, where that is another one. It is made at home, ahead of the trip: every shard
    writes the bytes that it is sent.
    """

    keys: torch.Tensor
    values: torch.Tensor
    latent: bool
    quantised: NewKV | None = None

    @property
    def stored(self) -> NewKV:
        """As it lies in a pool."""
        return self.quantised or self

    @property
    def travelling(self) -> tuple[torch.Tensor, ...]:
        return (self.keys,) if self.latent else (self.keys, self.values)


@dataclass(frozen=True)
class KVScales:
    """What the elements of a layer's quantised pool are multiplied by to give its K/V. A weight of the model: equal on all instances."""

    key: float = 1.0
    value: float = 1.0


NO_SCALES = KVScales()


@dataclass(frozen=True)
class StepPlan:
    """Everything the layers of one step need to know; constant over the layers, known on both sides before they start. A model whose
    layers attend a window has another plan for these: the same K/V travel, other queries do.

    Tuples have one entry per instance of the exchange group, in order of rank. A *chunk* is a row of several tokens; its tokens see each
    other at home, where all of their K/V is (chunk_rows over the step's new K/V), and those before it on every shard that holds some
    (pool_rows). A row of one token (decode) sees itself on its tail.

    send_queries:          own tokens whose query goes to that instance, and whose partial comes back.
    receive_query_splits:  queries that come from there.
    send_kv:               own tokens whose K/V goes there.
    receive_kv_slots:      slots of the K/V rows that come from there.
    write_slots [T]:       slot of each own token's K/V; 0 (the padding page) where it travels, or for padding.
    pool_rows:             rows over this instance's pool: first the own tokens `pool_tokens`, then the received queries, all of them.
    chunk_rows:            causal rows of the own tokens `chunk_tokens`, over the own tokens (pages of one token).
    merges:                where the partials of the own tokens come together.
    anybody_asks:          whether any instance sends a query; all know alike. If none does, nothing is returned and no call made for it.
    """

    step: int
    num_tokens: int
    send_queries: tuple[TokenList, ...]
    receive_query_splits: tuple[int, ...]
    send_kv: tuple[TokenList, ...]
    receive_kv_slots: tuple[torch.Tensor, ...]
    write_slots: torch.Tensor
    pool_rows: tuple[AttentionRow, ...]
    pool_tokens: TokenList
    chunk_rows: tuple[AttentionRow, ...]
    chunk_tokens: TokenList
    merges: MergeList
    anybody_asks: bool = True

    @property
    def num_received(self) -> int:
        return sum(self.receive_query_splits)
