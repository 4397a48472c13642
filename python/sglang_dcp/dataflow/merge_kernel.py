"""The merge of one partial result into others as one Triton kernel: reads and writes only the rows that it merges."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sglang_dcp.dataflow.contracts import PartialState, TokenList

TILE_ELEMENTS = 4096


# One variant per shape, whatever the rows are: a variant more would be compiled while requests wait.
@triton.jit(do_not_specialize_on_alignment=["index"])
def _merge_rows(
    outputs,
    lses,
    index,
    part_outputs,
    part_lses,
    heads: tl.constexpr,
    dim: tl.constexpr,
    block_heads: tl.constexpr,
    block_dim: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(index + row)
    head = tl.program_id(1) * block_heads + tl.arange(0, block_heads)
    is_head = head < heads
    old_lse = tl.load(lses + target * heads + head, mask=is_head, other=float("-inf"))
    new_lse = tl.load(part_lses + row * heads + head, mask=is_head, other=float("-inf"))
    peak = tl.maximum(old_lse, new_lse)
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    old_weight, new_weight = tl.exp(old_lse - peak), tl.exp(new_lse - peak)
    total = old_weight + new_weight
    column = tl.arange(0, block_dim)
    cells = head[:, None] * dim + column[None, :]
    inside = is_head[:, None] & (column < dim)[None, :]
    old = tl.load(outputs + target * heads * dim + cells, mask=inside, other=0.0).to(tl.float32)
    new = tl.load(part_outputs + row * heads * dim + cells, mask=inside, other=0.0).to(tl.float32)
    # A neutral partial's output may hold anything, NaN included.
    old = tl.where((old_weight > 0)[:, None], old * old_weight[:, None], 0.0)
    new = tl.where((new_weight > 0)[:, None], new * new_weight[:, None], 0.0)
    merged = (old + new) / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(outputs + target * heads * dim + cells, merged.to(outputs.dtype.element_ty), mask=inside)
    tl.store(lses + target * heads + head, tl.log(total) + peak, mask=is_head)


def merge_rows(state: PartialState, tokens: TokenList, part: PartialState) -> None:
    """`merge.merge_into` on a GPU. Capturable once it has run for the shape."""
    tensors = state.output, state.lse, part.output, part.lse
    if not all(tensor.is_contiguous() for tensor in tensors):
        raise ValueError(f"merge_rows takes contiguous tensors, got strides {[tensor.stride() for tensor in tensors]}")
    _, heads, dim = state.output.shape
    block_dim = triton.next_power_of_2(dim)
    block_heads = min(triton.next_power_of_2(heads), max(1, TILE_ELEMENTS // block_dim))
    grid = (len(tokens), triton.cdiv(heads, block_heads))
    _merge_rows[grid](
        state.output,
        state.lse,
        tokens.index,
        part.output,
        part.lse,
        heads=heads,
        dim=dim,
        block_heads=block_heads,
        block_dim=block_dim,
    )


def prepare(num_heads: int, v_head_dim: int, device: torch.device) -> None:
    """Compiles the kernel for bfloat16 rows of this shape: not while requests wait."""
    state = PartialState.neutral(1, num_heads, v_head_dim=v_head_dim, dtype=torch.bfloat16, device=device)
    merge_rows(state, TokenList(torch.zeros(1, dtype=torch.int64, device=device), 0), state)
