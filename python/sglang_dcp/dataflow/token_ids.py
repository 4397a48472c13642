"""Token ids of a decode step in which requests of the ledger begin a page: in torch, and in one launch of sgl-kernel-dcp."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from sglang_dcp.dataflow.device_plan import to_device

TokenIds = Callable[[torch.Tensor, torch.Tensor, int, Sequence[tuple[int, int]], Sequence[int]], torch.Tensor]
"""(last, pages, page_size, told, local) to token ids int64 [rows], one behind `last` int32 [rows] within a page.

told: (row, token id) of rows that begin a page; local: other rows that do, on the first of `pages` int64 in their order.
"""


def torch_token_ids(
    last: torch.Tensor, pages: torch.Tensor, page_size: int, told: Sequence[tuple[int, int]], local: Sequence[int]
) -> torch.Tensor:
    ids = last.to(torch.int64) + 1
    words = to_device(torch.tensor([*(row for row, _ in told), *(token_id for _, token_id in told), *local]), ids.device)
    rows_told, ids_told, rows_local = words.split([len(told), len(told), len(local)])
    return ids.index_copy_(0, rows_told, ids_told).index_copy_(0, rows_local, pages[: len(local)] * page_size)


def kernel_token_ids() -> TokenIds:
    """The kernel's form. ImportError where sgl-kernel-dcp is not installed; compiles it at first use."""
    from sgl_kernel_dcp import FROM_POOL, decode_token_ids

    def token_ids(
        last: torch.Tensor, pages: torch.Tensor, page_size: int, told: Sequence[tuple[int, int]], local: Sequence[int]
    ) -> torch.Tensor:
        out = torch.empty_like(last, dtype=torch.int64)
        rows, ids = [row for row, _ in told], [token_id for _, token_id in told]
        decode_token_ids(last, pages, page_size, rows + list(local), ids + [FROM_POOL] * len(local), out)
        return out

    return token_ids
