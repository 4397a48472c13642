"""SGLang's page allocator with a ledger: it owns the instance's pool for locals and guests alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator

from sglang_dcp.dataflow.token_ids import TokenIds, torch_token_ids
from sglang_dcp.ledger.homes import HomeBook, HomeRequest

PAGES_AHEAD = 32
"""Free pages whose numbers are read from the device at once: a request that grows takes one, and reading it alone waits for the device."""


class Books(Protocol):
    """What the allocator asks of the instance whose pool it is: who owns a page, and what new requests leave."""

    rank: int
    homes: HomeBook

    @property
    def withheld_pages(self) -> int: ...

    def release(self, request: HomeRequest) -> None: ...


class LedgerAllocator(PagedTokenToKVPoolAllocator):
    """Stock behaviour until a `Participant` is bound to it."""

    free_pages: torch.Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.participant: Books | None = None
        self._end_request: Callable[[HomeRequest], None] | None = None
        self.tree_cache: Any = None
        self._claimed_pages = 0
        self._ahead: list[int] = []  # free, but not in free_pages
        self._counted: torch.Tensor | None = None
        self._num_counted = 0
        self._token_ids: TokenIds = torch_token_ids
        super().__init__(*args, **kwargs)

    def bind(
        self,
        participant: Books,
        tree_cache: Any,
        token_ids: TokenIds = torch_token_ids,
        end_request: Callable[[HomeRequest], None] | None = None,
    ) -> None:
        """end_request: takes a request whose row is freed out of the books; None: `release` does."""
        self.participant, self.tree_cache, self._token_ids = participant, tree_cache, token_ids
        self._end_request = end_request or participant.release

    def num_givable_pages(self) -> int:
        """Free pages plus those that eviction from the prefix cache would free."""
        return (self.available_size() + self.tree_cache.evictable_size()) // self.page_size

    def has_free(self, count: int) -> bool:
        """Whether `count` pages are there to be taken as they are, claimed ones among them."""
        return (self._num_counted if self.free_pages is self._counted else self._num_free()) >= count

    def _num_free(self) -> int:
        """len(free_pages), which is asked for several times in a step: SGLang puts another tensor there whenever pages come or go."""
        pages = self.free_pages
        if pages is not self._counted:
            self._counted, self._num_counted = pages, pages.numel()
        return self._num_counted

    def claim_decode_page(self) -> bool:
        """Sets one page aside for a local request's next token; the stock allocation of this step takes it."""
        if len(self.free_pages) <= self._claimed_pages and self.num_givable_pages() <= self._claimed_pages:
            return False
        self._claimed_pages += 1
        return True

    def keep_free(self, count: int) -> None:
        """Sets pages aside that no request which decodes may have."""
        self._claimed_pages += count

    def settle_decode_claims(self) -> None:
        """The stock allocation of the step comes next: claimed pages are its own again, and those that are kept are still there."""
        self._claimed_pages = 0

    def take_pages(self, count: int) -> list[int] | None:
        """Takes `count` physical pages out of the pool, evicting cached prefixes when short. None when they are not there."""
        if count < PAGES_AHEAD and len(self.free_pages) >= self._claimed_pages + 2 * PAGES_AHEAD:
            if len(self._ahead) < count:
                pages = self._take(PAGES_AHEAD)
                assert pages is not None
                self._ahead += pages.tolist()
            taken, self._ahead = self._ahead[:count], self._ahead[count:]
            return taken
        found = self._take(count)
        return None if found is None else found.tolist()

    def _free_enough(self, count: int) -> bool:
        """Whether free_pages has `count` pages beside the claimed ones, once cached prefixes are evicted for them."""
        count_and_claims = count + self._claimed_pages
        if count_and_claims > len(self.free_pages):
            self.evict_to_free_tokens(self.tree_cache, count_and_claims * self.page_size)
            self.merge_and_sort_free()
        return count_and_claims <= len(self.free_pages)

    def _take(self, count: int) -> torch.Tensor | None:
        if not self._free_enough(count):
            return None
        taken = self.free_pages[:count]
        self.free_pages = self.free_pages[count:]
        return taken

    def alloc_decode_beside(self, last_loc: torch.Tensor, told: Sequence[tuple[int, int]], local: Sequence[int]) -> torch.Tensor:
        """Token ids [rows] int64 of a decode step's new tokens, as TokenIds says.

        told: rows of the ledger that begin a page; local: the other rows that do, which get a page of the pool each. RuntimeError when it
        has too few, which `claim_decode_page` has ruled out.
        """
        if not self._free_enough(len(local)):
            raise RuntimeError(f"a decode step needs {len(local)} pages, {self.num_givable_pages()} can be had (--max-total-tokens)")
        ids = self._token_ids(last_loc, self.free_pages, self.page_size, told, local)
        if local:
            self.free_pages = self.free_pages[len(local) :]
        return ids

    # ---- pages read ahead are free pages to everybody else

    def available_size(self) -> int:
        # SGLang's formula, without the way through torch's Python that len() of a tensor takes: every step asks.
        return (self._num_free() + self.num_staged_pages + len(self._ahead)) * self.page_size

    def get_all_free_pages(self) -> torch.Tensor:
        return torch.cat([super().get_all_free_pages(), self.free_pages.new_tensor(self._ahead)])

    def merge_and_sort_free(self) -> None:
        """Called where free_pages are too few."""
        if self._ahead:
            self.free_pages = torch.cat([self.free_pages, self.free_pages.new_tensor(self._ahead)])
            self._ahead = []
        super().merge_and_sort_free()

    def clear(self) -> None:
        self._ahead = []
        super().clear()

    # ----

    def return_pages(self, pages: list[int]) -> None:
        if pages:
            self.free_page_ids(torch.tensor(pages, dtype=torch.int64, device=self.device))

    def free_segments(self, segments: Any) -> None:
        """Frees a request's KV row. A managed request's pages go back through the ledger, whole and at once. It is known by the last of
        them: it may begin with pages that it reads."""
        segments = [(ids, start) for ids, start in segments if ids.numel()]
        if self.participant is not None and segments:
            homes, page_id = self.participant.homes, int(segments[-1][0][-1]) // self.page_size
            handle = homes.handle_of(page_id)
            if handle is not None:
                assert self._end_request is not None
                self._end_request(homes.requests[handle])
                return
            if homes.closed_this_step(page_id):
                return
        super().free_segments(segments)

    def create_prefill_budget(self, tree_cache: Any, *, num_mixed_decode_tokens: int = 0) -> Any:
        """Pages promised to the first waiting reservation, and those left to growth, are no longer there for local admission."""
        budget = super().create_prefill_budget(tree_cache, num_mixed_decode_tokens=num_mixed_decode_tokens)
        if self.participant is not None:
            withheld = self.participant.withheld_pages * self.page_size
            budget.total_offset += withheld
            budget.current_offset += withheld
        return budget

    def check_decode_capacity(self, *, num_tokens: int, tree_cache: Any, requests: Any = None, spec_algorithm: Any = None) -> bool:
        """Never short: requests without a page for their next token have left the batch before this is asked (sitting_out.py)."""
        if self.participant is None:
            return bool(
                super().check_decode_capacity(
                    num_tokens=num_tokens, tree_cache=tree_cache, requests=requests, spec_algorithm=spec_algorithm
                )
            )
        return True

    def max_new_tokens_for_memory(self, input_tokens: int, max_new_tokens: int, *, token_capacity: int, **kwargs: Any) -> int | None:
        """A request may grow over the pools that its policy lets it use."""
        from sglang_dcp.upstream.pool.capacity import reach_tokens

        reach = reach_tokens(token_capacity, self.page_size)
        return super().max_new_tokens_for_memory(input_tokens, max_new_tokens, token_capacity=reach, **kwargs)
