"""How FlashAttention 3 spreads a step's decode rows over the GPU: a schedule of our own, made once per step on the device.

The kernel takes its schedule as an argument, `scheduler_metadata`; without one it makes it anew in every layer: parts of at most 1.1 times
a multiprocessor's even share. Rows a little longer than half of that share then leave a third of the GPU idle, and rows of which the half
lies elsewhere, as sharding makes them, are often that long. Here several lengths of a part are tried, each priced by handing its
parts out as the kernel will, longest first to whoever is free, and the cheapest is taken (measured: docs/results/kernels.md).

The argument's layout is that of sgl_kernel's FlashAttention 3 (prepare_varlen_num_blocks in flash_prepare_scheduler.cu): vectors of one
int32 per row, rounded up to four rows, of rows in the order of their parts' lengths: parts of a row, query tiles of a row, the row; for
causal attention also heads that share the cache; and behind them the counter that hands out the parts.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from sglang_dcp.dataflow.attention.flash_splits import MOST_SCHEDULED, most_splits

FEWEST_ROWS = 64
"""Device code is built for this many rows and for twice as many, and so on."""
CUTS = 16
"""Lengths of a part that are tried."""

WIDEST = tl.constexpr(1.1)
CUTS_PER_HALVING = tl.constexpr(4)
"""The lengths: this share of a multiprocessor's work, FlashAttention's own, and shorter by the fourth root of a half each."""
PART_ROUNDS = tl.constexpr(2)
"""What a part costs beside its rounds over keys, in rounds."""
FINEST = tl.constexpr(10)
"""Parts of less than this share of a multiprocessor's work fill what gaps the others leave: they are not handed out one by one."""
ROW_BASE = tl.constexpr(1024)
PLACE_BASE = tl.constexpr(256)
"""A sorted part carries its row, a multiprocessor's load its place."""
NO_LOAD = tl.constexpr(2**31 - 1)

SIZES_AND_LISTS = ["num_rows", "lengths", "costs", "order", "schedule"]


@triton.jit
def _rounds(lengths, block_tokens: tl.constexpr):
    """Of the kernel over a row's keys."""
    return (lengths + (block_tokens - 1)) // block_tokens


@triton.jit
def _parts(rounds, target, most_parts: tl.constexpr):
    """Into how many parts rows are cut, and what one of them costs."""
    parts = tl.minimum(tl.maximum((rounds + target - 1) // target, 1), most_parts)
    return parts, (rounds + parts - 1) // parts + PART_ROUNDS


@triton.jit
def _target(rounds, cut, kv_heads: tl.constexpr, multiprocessors: tl.constexpr):
    """Rounds of a part, where rows have these."""
    share = tl.sum(rounds) * kv_heads / multiprocessors
    return (share * WIDEST * tl.exp2(-cut.to(tl.float32) / CUTS_PER_HALVING)).to(tl.int32) + 1


# One variant per captured size, whatever the rows are: a variant more would be compiled while requests wait.
@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=SIZES_AND_LISTS)
def _price_cut(
    lengths,
    costs,
    order,
    num_rows,
    kv_heads: tl.constexpr,
    multiprocessors: tl.constexpr,
    most_parts: tl.constexpr,
    block_tokens: tl.constexpr,
    block_rows: tl.constexpr,
    block_places: tl.constexpr,
):
    cut, row = tl.program_id(0), tl.arange(0, block_rows)
    is_row = row < num_rows
    rounds = _rounds(tl.load(lengths + row, mask=is_row, other=0), block_tokens)
    target = _target(rounds, cut, kv_heads, multiprocessors)
    parts, cost = _parts(rounds, target, most_parts)
    parts = tl.where(is_row, parts, 0)
    work = tl.sum(parts * cost) * kv_heads
    order += cut * block_rows
    tl.store(order + row, tl.sort(tl.where(is_row, cost * ROW_BASE + row, 0), descending=True))
    tl.debug_barrier()  # the others' places are read below
    place = tl.arange(0, block_places)
    loads = tl.where(place < multiprocessors, place, NO_LOAD)
    done, longest = 0, tl.load(order)
    while (done < num_rows) & (longest // ROW_BASE * (multiprocessors * FINEST) >= work):
        of_row, cost_each = _parts(_rounds(tl.load(lengths + longest % ROW_BASE), block_tokens), target, most_parts)
        for _ in range(of_row * kv_heads):
            least = tl.min(loads)
            loads = tl.where(loads == least, loads + cost_each * PLACE_BASE, loads)
        done += 1
        longest = tl.load(order + tl.minimum(done, block_rows - 1))
    busiest = tl.max(tl.where(place < multiprocessors, loads // PLACE_BASE, 0))
    # Twice the rounds of all multiprocessors, and one for each part: every part's result is written and read again.
    tl.store(costs + cut, tl.maximum(busiest * multiprocessors, work) * 2 + tl.sum(parts) * kv_heads)


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=SIZES_AND_LISTS)
def _write_cheapest(
    lengths,
    costs,
    order,
    schedule,
    num_rows,
    kv_heads: tl.constexpr,
    multiprocessors: tl.constexpr,
    most_parts: tl.constexpr,
    block_tokens: tl.constexpr,
    block_rows: tl.constexpr,
    cuts: tl.constexpr,
    vectors: tl.constexpr,
):
    cut = tl.argmin(tl.load(costs + tl.arange(0, cuts)), 0)
    place = tl.arange(0, block_rows)
    is_row = place < num_rows
    target = _target(_rounds(tl.load(lengths + place, mask=is_row, other=0), block_tokens), cut, kv_heads, multiprocessors)
    row = tl.load(order + cut * block_rows + place, mask=is_row, other=0) % ROW_BASE
    parts, _ = _parts(_rounds(tl.load(lengths + row, mask=is_row, other=0), block_tokens), target, most_parts)
    rounded = (num_rows + 3) // 4 * 4
    tl.store(schedule + place, parts, mask=is_row)
    tl.store(schedule + rounded + place, tl.full((block_rows,), 1, tl.int32), mask=is_row)
    tl.store(schedule + 2 * rounded + place, row, mask=is_row)
    if vectors == 4:
        tl.store(schedule + 3 * rounded + place, tl.full((block_rows,), kv_heads, tl.int32), mask=is_row)
    tl.store(schedule + vectors * rounded, 0)


def block_tokens(kv_dtype: torch.dtype) -> int:
    """Keys of one round of the kernel over pages, for heads of 128 elements; for others near enough."""
    return 160 if kv_dtype.itemsize == 1 else 128


def _vectors(causal: bool) -> int:
    return 4 if causal else 3


def _vector_length(num_rows: int) -> int:
    return -(-num_rows // 4) * 4


def check_layout(
    num_heads: int, kv_heads: int, head_dim: int, kv_dtype: torch.dtype, page_size: int, causal: bool, device: torch.device | str
) -> None:
    """Raises RuntimeError where the installed library lays its schedule out otherwise: it is asked for one of rows with one key each."""
    from sgl_kernel.flash_attn import get_scheduler_metadata

    rows, vectors = 5, _vectors(causal)
    made = get_scheduler_metadata(
        batch_size=rows,
        max_seqlen_q=1,
        max_seqlen_k=page_size,
        num_heads=num_heads,
        num_heads_k=kv_heads,
        headdim=head_dim,
        cache_seqlens=torch.ones(rows, dtype=torch.int32, device=device),
        qkv_dtype=kv_dtype,
        page_size=page_size,
        causal=True,
        num_splits=2,
    ).tolist()
    rounded = _vector_length(rows)
    listed = [made[begin : begin + rows] for begin in range(0, 3 * rounded, rounded)]
    if len(made) != vectors * rounded + 1 or listed[:2] != [[1] * rows] * 2 or sorted(listed[2]) != list(range(rows)) or made[-1] != 0:
        raise RuntimeError(
            f"this FlashAttention 3 (sgl_kernel) schedules {rows} rows of one key as {made}, not in {vectors} vectors as it did where "
            "long rows were first split by us; start with --dyncp-split-budget stock"
        )


class FlashSchedule:
    """The argument for `num_rows` rows of one query token: `metadata`, int32 on the device, which `plan` fills. `plan` may be captured.

    most_parts: what the kernel is told as its `num_splits`; no row gets more. causal: flash_splits.has_causal_schedule. block_tokens:
    keys of one round of the kernel.
    """

    def __init__(
        self,
        num_rows: int,
        kv_heads: int,
        most_parts: int,
        device: torch.device | str,
        *,
        multiprocessors: int,
        causal: bool = False,
        block_tokens: int = 128,
    ) -> None:
        if num_rows > MOST_SCHEDULED:
            raise ValueError(f"a schedule for FlashAttention 3 takes at most {MOST_SCHEDULED} rows, got {num_rows}")
        if multiprocessors > PLACE_BASE.value:
            raise ValueError(
                f"a schedule for FlashAttention 3 takes at most {PLACE_BASE.value} multiprocessors, this GPU has {multiprocessors}"
            )
        self.num_rows, self._vectors, self._places = num_rows, _vectors(causal), triton.next_power_of_2(multiprocessors)
        block_rows = max(FEWEST_ROWS, triton.next_power_of_2(num_rows))
        self.metadata = torch.zeros(self._vectors * _vector_length(num_rows) + 1, dtype=torch.int32, device=device)
        self._costs = torch.zeros(CUTS, dtype=torch.int32, device=device)
        self._order = torch.zeros(CUTS, block_rows, dtype=torch.int32, device=device)
        self._sizes: dict[str, Any] = {
            "kv_heads": kv_heads,
            "multiprocessors": multiprocessors,
            "most_parts": most_parts,
            "block_tokens": block_tokens,
            "block_rows": block_rows,
        }

    def plan(self, lengths: torch.Tensor) -> None:
        """lengths int32 [num_rows]: keys of each row, 0 for padding."""
        lists = lengths, self._costs, self._order
        _price_cut[(CUTS,)](*lists, self.num_rows, **self._sizes, block_places=self._places, num_warps=1)
        _write_cheapest[(1,)](*lists, self.metadata, self.num_rows, **self._sizes, cuts=CUTS, vectors=self._vectors)


def schedule_on(device: torch.device | str, num_rows: int, kv_heads: int, kv_dtype: torch.dtype, *, causal: bool = False) -> FlashSchedule:
    """A schedule for num_rows decode rows on `device`. causal: as `has_causal_schedule` says, where the call is."""
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    parts = most_splits(multiprocessors, kv_heads)
    return FlashSchedule(
        num_rows, kv_heads, parts, device, multiprocessors=multiprocessors, causal=causal, block_tokens=block_tokens(kv_dtype)
    )
