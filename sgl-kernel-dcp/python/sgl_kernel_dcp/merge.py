"""Merge of stacked partial results."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sgl_kernel_dcp.build import load_library

if TYPE_CHECKING:
    import torch


def merge_stacked(outputs: torch.Tensor, lses: torch.Tensor, merged: torch.Tensor, merged_lse: torch.Tensor | None = None) -> None:
    """Merges partial results that are all on this GPU, into `merged`.

    outputs bfloat16 [partials <= 16, rows, heads, v_head_dim], lses float32 [partials, rows, heads] in natural log (-inf: neutral, its
    output is not read into the result, NaN included), merged bfloat16 [rows, heads, v_head_dim], merged_lse float32 [rows, heads].
    Launches one kernel on the current stream; allocates nothing; capturable.
    """
    load_library().merge_stacked(outputs, lses, merged, merged_lse)
