"""How a captured FlashInfer decode (fa2, tensor cores) splits its rows: a long row gets chunks however many rows stand beside it.

FlashInfer 0.7.2 gives a captured decode two thread blocks per multiprocessor, 264 / KV heads chunks on a Hopper GPU, for all captured rows,
padding rows included (PrefillPlan in its scheduler.cuh). That is right for rows of equal length, and from that many rows on no row is
split at all: a row of 300,000 tokens then takes ten times as long as it need. Here every captured row has one chunk of its own, the same
number as FlashInfer's stands by for long rows, and a chunk is the work that a share of the GPU would have if all of it were spread evenly.

All of this is said by arguments that FlashInfer's planner takes: the number of multiprocessor blocks that others use (here negative: there
are more), a fixed chunk, and lengths. Its arrays, its kernels and its merge stay as they are, and none of its files is touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

BLOCKS_PER_SM = 2
"""FlashInfer's own: what it takes a multiprocessor to hold, whatever the kernel."""
SHARES_PER_SM = 2
"""Chunks of even work per multiprocessor. FlashInfer's number too, so that short rows are split as finely as by stock; more gained little
(docs/results/kernels.md)."""
MIN_CHUNK_TOKENS = 128
"""FlashInfer's own lower bound of a chunk."""
MOST_GROUP = 64
"""Query heads per KV head that one tile of the kernel takes: beyond, a row would need two blocks per chunk."""

# Places of the planner's arguments (0.7.2, batch_prefill.cu, BatchPrefillWithKVCachePlan), and how many there are for fa2.
NUM_ARGUMENTS = 20
PAGE_INDPTR, LENGTHS, NUM_ROWS, QUERY_HEADS, KV_HEADS, PAGE_SIZE, IS_GRAPH = 4, 5, 7, 8, 9, 10, 11
FIXED_SPLIT, DISABLE_SPLIT, COLOCATED_BLOCKS, UNIFORM_QUERIES = 16, 17, 18, 19


def shares(num_multiprocessors: int, kv_heads: int) -> int:
    """Chunks per KV head over which a step's work is spread: also how many a captured decode has beyond one per row."""
    return max(1, SHARES_PER_SM * num_multiprocessors // kv_heads)


def chunk_pages(page_counts: np.ndarray, num_shares: int, page_size: int) -> int:
    """Pages of a chunk so that all rows together have at most len(page_counts) + num_shares chunks, none longer than an even share of the
    work (rounded up to a page, and to MIN_CHUNK_TOKENS). page_counts: int [rows], 0 for padding."""
    least = max(1, MIN_CHUNK_TOKENS // page_size)
    return max(least, -(-int(page_counts.sum()) // num_shares))


def planning_counts(page_counts: np.ndarray, pages: int) -> np.ndarray:
    """What the planner is told: the rows' pages, and one empty chunk more for the first row where no row has two.

    A plan in which no row is split has no merge and lays out its arrays otherwise, but the captured launch has one. The kernel cuts a chunk
    beyond a row's end to nothing, and the merge gives it no weight.
    """
    if page_counts.max(initial=0) > pages:
        return page_counts
    counts = page_counts.copy()
    counts[0] = pages + 1
    return counts


def replan(arguments: Sequence[Any], num_multiprocessors: int) -> list[Any]:
    """The planner's arguments with our budget. Unchanged where it is not a captured decode of one query per row, or asks for a split of
    its own."""
    changed = list(arguments)
    if len(changed) != NUM_ARGUMENTS or not changed[IS_GRAPH] or changed[DISABLE_SPLIT] or changed[FIXED_SPLIT] > 0:
        return changed
    if changed[UNIFORM_QUERIES] or changed[QUERY_HEADS] > MOST_GROUP * changed[KV_HEADS]:
        return changed
    indptr = changed[PAGE_INDPTR]
    page_counts = np.diff(indptr.numpy())
    num_shares = shares(num_multiprocessors, changed[KV_HEADS])
    # The grid is captured, so it follows from the captured size alone: one chunk per row and the shares.
    blocks = (changed[NUM_ROWS] + num_shares) * changed[KV_HEADS]
    changed[COLOCATED_BLOCKS] = BLOCKS_PER_SM * num_multiprocessors - blocks
    changed[FIXED_SPLIT] = pages = chunk_pages(page_counts, num_shares, changed[PAGE_SIZE])
    told = np.concatenate([[0], planning_counts(page_counts, pages).cumsum()])
    changed[PAGE_INDPTR] = torch.from_numpy(told.astype(np.int32))
    return changed


class _Planner:
    """A FlashInfer module whose `plan` has our budget (num_multiprocessors None: its own); all else is the module's."""

    def __init__(self, module: Any, num_multiprocessors: int | None) -> None:
        self._module, self._num_multiprocessors = module, num_multiprocessors
        self.arguments: tuple[Any, ...] = ()

    def plan(self, *arguments: Any) -> Any:
        self.arguments = arguments
        return self._module.plan(*arguments if self._num_multiprocessors is None else replan(arguments, self._num_multiprocessors))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def with_split_budget(wrapper_class: type, *, own: bool = True) -> type:
    """A subclass of FlashInfer's BatchDecodeWithPagedKVCacheWrapper whose plans, `fast_decode_plan` included, have our budget, or with
    own=False FlashInfer's."""

    class SplitBudgetDecode(wrapper_class):
        def plan_again(self, page_indptr: torch.Tensor, lengths: torch.Tensor) -> bool:
            """The last plan's call of the planner with other rows: page_indptr [rows + 1], lengths [rows] in tokens, int32 on the host.

            That is what of `plan` a captured decode needs whose page lists a kernel writes on the device: `plan` copies them there, and
            looks at everything that a graph has fixed. False: there was no plan yet, or it takes other arguments.
            """
            arguments = [*getattr(getattr(self, "_cached_module", None), "arguments", ())]
            if len(arguments) != NUM_ARGUMENTS or len(lengths) != arguments[NUM_ROWS]:
                return False
            arguments[PAGE_INDPTR], arguments[LENGTHS] = page_indptr, lengths
            self._plan_info = self._cached_module.plan(*arguments)
            return True

        @property
        def _cached_module(self) -> Any:
            try:
                return self.__dict__["_split_budget_module"]
            except KeyError:
                raise AttributeError("_cached_module") from None

        @_cached_module.setter
        def _cached_module(self, module: Any) -> None:
            if not isinstance(module, _Planner):
                module = _Planner(module, torch.cuda.get_device_properties(self.device).multi_processor_count if own else None)
            self.__dict__["_split_budget_module"] = module

    SplitBudgetDecode.__name__ = SplitBudgetDecode.__qualname__ = wrapper_class.__name__
    return SplitBudgetDecode
