"""The merge of all partials of a step's tokens as one Triton kernel: reads and writes only the rows that it merges."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sglang_dcp.dataflow.contracts import MergeList, PartialState
from sglang_dcp.dataflow.dispatch import partial_width, partials_in

TILE_ELEMENTS = 4096
INDEX_LISTS_AND_LSES = ["lses", "tokens", "pool_rows", "begins", "returned_rows", "own_lses", "returned_lses"]


@triton.jit
def _weighted(outputs, lse, peak, cells, inside):
    """Values by their weight, and the weight. A neutral partial's output may hold anything, NaN included."""
    weight = tl.exp(lse - peak)
    values = tl.load(outputs + cells, mask=inside & (weight > 0)[:, None], other=0.0).to(tl.float32)
    return values * weight[:, None], weight


# One variant per shape, whatever the rows are: a variant more would be compiled while requests wait.
@triton.jit(do_not_specialize_on_alignment=INDEX_LISTS_AND_LSES)
def _merge_rows(
    outputs,
    lses,
    tokens,
    pool_rows,
    begins,
    returned_rows,
    own_outputs,
    own_lses,
    returned_outputs,
    returned_lses,
    heads: tl.constexpr,
    dim: tl.constexpr,
    returned_stride: tl.constexpr,
    returned_lse_stride: tl.constexpr,
    block_heads: tl.constexpr,
    block_dim: tl.constexpr,
):
    row = tl.program_id(0)
    target, own = tl.load(tokens + row), tl.load(pool_rows + row)
    first, last = tl.load(begins + row), tl.load(begins + row + 1)
    head = tl.program_id(1) * block_heads + tl.arange(0, block_heads)
    is_head = head < heads
    column = tl.arange(0, block_dim)
    cells = head[:, None] * dim + column[None, :]
    inside = is_head[:, None] & (column < dim)[None, :]
    lse = tl.load(lses + target * heads + head, mask=is_head, other=float("-inf"))
    own_lse = tl.load(own_lses + own * heads + head, mask=is_head & (own >= 0), other=float("-inf"))
    peak = tl.maximum(lse, own_lse)
    for i in range(first, last):
        part_lse = tl.load(returned_lses + tl.load(returned_rows + i) * returned_lse_stride + head, mask=is_head, other=float("-inf"))
        peak = tl.maximum(peak, part_lse)
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    merged, total = _weighted(outputs + target * heads * dim, lse, peak, cells, inside)
    values, weight = _weighted(own_outputs + own * heads * dim, own_lse, peak, cells, inside)
    merged += values
    total += weight
    for i in range(first, last):
        part = tl.load(returned_rows + i)
        part_lse = tl.load(returned_lses + part * returned_lse_stride + head, mask=is_head, other=float("-inf"))
        values, weight = _weighted(returned_outputs + part * returned_stride, part_lse, peak, cells, inside)
        merged += values
        total += weight
    merged = merged / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(outputs + target * heads * dim + cells, merged.to(outputs.dtype.element_ty), mask=inside)
    tl.store(lses + target * heads + head, tl.log(total) + peak, mask=is_head)


def merge_rows(state: PartialState, merges: MergeList, own: PartialState, returned: PartialState) -> None:
    """`merge.merge_into` on a GPU. Capturable once it has run for the shape."""
    for name, part in (("state", state), ("own", own)):
        if not (part.output.is_contiguous() and part.lse.is_contiguous()):
            raise ValueError(f"merge_rows takes a contiguous {name}, got strides {part.output.stride()} and {part.lse.stride()}")
    _, heads, dim = state.output.shape
    if returned.output.stride()[1:] != (dim, 1) or returned.lse.stride(1) != 1:
        raise ValueError(f"merge_rows takes returned rows that are dense, got strides {returned.output.stride()}, {returned.lse.stride()}")
    block_dim = triton.next_power_of_2(dim)
    block_heads = min(triton.next_power_of_2(heads), max(1, TILE_ELEMENTS // block_dim))
    grid = (len(merges), triton.cdiv(heads, block_heads))
    _merge_rows[grid](
        state.output,
        state.lse,
        *merges.index_lists,
        own.output,
        own.lse,
        returned.output,
        returned.lse,
        heads=heads,
        dim=dim,
        returned_stride=returned.output.stride(0),
        returned_lse_stride=returned.lse.stride(0),
        block_heads=block_heads,
        block_dim=block_dim,
    )


def prepare(num_heads: int, v_head_dim: int, device: torch.device) -> None:
    """Compiles the kernel for bfloat16 rows of this shape: not while requests wait."""
    state = PartialState.neutral(1, num_heads, v_head_dim=v_head_dim, dtype=torch.bfloat16, device=device)
    width = partial_width(num_heads, v_head_dim, torch.bfloat16)
    returned = partials_in(torch.zeros(1, width, dtype=torch.bfloat16, device=device), num_heads, v_head_dim)
    row, begins = torch.zeros(1, dtype=torch.int64, device=device), torch.arange(2, device=device)
    merge_rows(state, MergeList(row, row, begins, row), state, returned)
