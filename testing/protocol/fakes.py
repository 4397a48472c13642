"""What is SGLang's: the page pool, and a request whose tokens are only counted."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from sglang_dcp.policy.types import Placement


class FakePool:
    """Pages 1..num_pages, with LedgerAllocator's interface towards the ledger."""

    def __init__(self, num_pages: int) -> None:
        self.free = list(range(num_pages, 0, -1))
        self._is_free = [True] * (num_pages + 1)
        self._claimed = 0

    def num_givable_pages(self) -> int:
        return len(self.free)

    def has_free(self, count: int) -> bool:
        return len(self.free) >= count

    def claim_decode_page(self) -> bool:
        if len(self.free) <= self._claimed:
            return False
        self._claimed += 1
        return True

    def keep_free(self, count: int) -> None:
        self._claimed += count

    def settle_decode_claims(self) -> None:
        self._claimed = 0

    def take_pages(self, count: int) -> list[int] | None:
        if count + self._claimed > len(self.free):
            return None
        taken = [self.free.pop() for _ in range(count)]
        for page in taken:
            assert self._is_free[page]
            self._is_free[page] = False
        return taken

    def return_pages(self, pages: list[int]) -> None:
        for page in pages:
            assert not self._is_free[page], f"page {page} is freed twice"
            self._is_free[page] = True
            self.free.append(page)


@dataclass
class ModelKv:
    """The part of SGLang's per-request KV record that our code reads."""

    req_pool_idx: int
    kv_allocated_len: int = 0
    cache_protected_len: int = 0
    kv_committed_len: int = 0

    holds_mamba = False

    @property
    def holds_kv(self) -> bool:
        return self.kv_allocated_len > 0


@dataclass(eq=False)
class ModelRequest:
    """A request whose output tokens are its number. pages: those of a local one, by number."""

    rid: str
    origin_input_ids: list[int]
    max_new_tokens: int
    dyncp_placement: Placement | None
    dyncp_placement_flexible: bool
    kv: ModelKv
    output_ids: list[int] = field(default_factory=list)
    dyncp: Any = None
    dyncp_prefix_pages: int = 0
    extra_key: str | None = None
    dyncp_extra_key: str | None = None
    prefix_len: int = 0
    aborted: bool = False
    was_managed: bool = False
    to_finish: Any = None
    pages: list[int] = field(default_factory=list)
    finished_in_step: int | None = None

    cache_salt = input_embeds = positional_embed_overrides = multimodal_inputs = session = None

    @property
    def sampling_params(self) -> Any:
        return SimpleNamespace(max_new_tokens=self.max_new_tokens)

    @property
    def full_untruncated_fill_ids(self) -> list[int]:
        return self.origin_input_ids + self.output_ids

    @property
    def finished_reason(self) -> Any:
        return SimpleNamespace(to_json=lambda: {"type": "abort" if self.aborted else "length"})

    def owned_kv_len(self) -> int:
        return self.kv.kv_allocated_len

    def _compute_max_prefix_len(self, input_len: int) -> int:
        return input_len - 1

    @property
    def listed_pages(self) -> list[int]:
        """What SGLang's token table lists of a request with all its pages at home."""
        return self.pages if self.dyncp is None else [page.number for page in self.dyncp.pages if page is not None]

    def finished(self) -> bool:
        return len(self.output_ids) >= self.max_new_tokens

    def next_output_finishes_by_length(self) -> bool:
        return len(self.output_ids) + 1 >= self.max_new_tokens
