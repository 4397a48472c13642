"""Token ids of a decode step in which some rows begin a page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sgl_kernel_dcp.build import load_library

if TYPE_CHECKING:
    import torch

FROM_POOL = -1


def decode_token_ids(
    last: torch.Tensor, free_pages: torch.Tensor, page_size: int, rows: Sequence[int], ids: Sequence[int], out: torch.Tensor
) -> None:
    """out[row] = last[row] + 1, but for `rows`: those get `ids`, or with FROM_POOL the first token of the next page of free_pages.

    last: int32 [n], token id of every row's last token; free_pages: int64, page numbers, taken from the front in the order of `rows`;
    out: int64 [n]. A launch on the current stream for every 256 such rows; no copy. ValueError names a row or a count out of bounds.
    """
    load_library().decode_token_ids(last, free_pages, page_size, tuple(rows), tuple(ids), out)
