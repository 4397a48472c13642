"""Collectives that SGLang 0.5.23 offers through NCCL alone, for gloo.

Only the pair that attention data parallelism calls in prefill steps (padding mode SUM_LEN): a gather and a reduce-scatter of
unequal parts. gloo has neither, so the gather pads to the longest part and the reduce-scatter sums everything and keeps its part.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist


def without_pynccl(*args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Before GroupCoordinator.__init__(self, group_ranks, local_rank, backend, use_pynccl, ...): never build a NCCL communicator.

    Upstream decides by device names that do not include the CPU and would load libnccl and ask for a CUDA device.
    """
    if "use_pynccl" in kwargs:
        return args, {**kwargs, "use_pynccl": False}
    if len(args) > 4:
        return (*args[:4], False, *args[5:]), kwargs
    raise TypeError("GroupCoordinator.__init__ was called without use_pynccl; see test/upstream/test_cpu_gaps.py")


def reduce_scatterv(
    group: Any, input_: torch.Tensor, output: torch.Tensor | None = None, sizes: Sequence[int] | None = None
) -> torch.Tensor:
    """Sums `input_` [sum(sizes), ...] over the ranks and returns this rank's rows [sizes[rank], ...].

    group: GroupCoordinator. Without sizes the rows are split evenly. `input_` keeps its values.
    """
    sizes = _sizes_or_even(sizes, input_.shape[0], group.world_size)
    summed = input_.clone()
    dist.all_reduce(summed, group=group.device_group)
    start = sum(sizes[: group.rank_in_group])
    part = summed[start : start + sizes[group.rank_in_group]]
    if output is None:
        return part.clone()
    if output.shape != part.shape:
        raise ValueError(f"reduce_scatterv: output {tuple(output.shape)} does not match {tuple(part.shape)}")
    return output.copy_(part)


def all_gatherv(
    group: Any,
    input_: torch.Tensor | Sequence[torch.Tensor],
    sizes: Sequence[int] | None = None,
    output: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """Concatenates rows of all ranks. One result per input, as a list also for one tensor (upstream's contract).

    group: GroupCoordinator; sizes: rows per rank, all equal when absent; output: destination, with a single input only.
    """
    if not isinstance(input_, torch.Tensor):
        if output is not None:
            raise ValueError("all_gatherv: output needs a single input")
        return [_gather_rows(group, one, sizes) for one in input_]
    gathered = _gather_rows(group, input_, sizes)
    if output is None:
        return [gathered]
    if output.shape != gathered.shape:
        raise ValueError(f"all_gatherv: output {tuple(output.shape)} does not match {tuple(gathered.shape)}")
    return [output.copy_(gathered)]


def _gather_rows(group: Any, rows: torch.Tensor, sizes: Sequence[int] | None) -> torch.Tensor:
    sizes = list(sizes) if sizes is not None else [rows.shape[0]] * group.world_size
    if sizes[group.rank_in_group] != rows.shape[0]:
        raise ValueError(f"all_gatherv: rank {group.rank_in_group} has {rows.shape[0]} rows, sizes say {sizes}")
    padded = rows.new_zeros((max(sizes), *rows.shape[1:]))
    padded[: rows.shape[0]] = rows
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded, group=group.device_group)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def _sizes_or_even(sizes: Sequence[int] | None, num_rows: int, world_size: int) -> list[int]:
    if sizes is None:
        if num_rows % world_size:
            raise ValueError(f"reduce_scatterv: {num_rows} rows do not split evenly over {world_size} ranks; pass sizes")
        return [num_rows // world_size] * world_size
    if len(sizes) != world_size or sum(sizes) != num_rows:
        raise ValueError(f"reduce_scatterv: sizes {list(sizes)} do not cover {num_rows} rows on {world_size} ranks")
    return list(sizes)
