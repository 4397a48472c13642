"""gloo versions of the two collectives of unequal parts, on three real ranks, against the definition."""

from __future__ import annotations

import types
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from sglang_dcp.cpu.collectives import all_gatherv, reduce_scatterv, without_pynccl

WORLD_SIZE = 3
SIZE_CASES = ([2, 0, 3], [1, 1, 1], [0, 0, 4], [0, 0, 0])


def rows_of(rank: int, num_rows: int) -> torch.Tensor:
    return torch.arange(num_rows * 2, dtype=torch.float32).view(num_rows, 2) + 100 * (rank + 1)


def run_rank(rank: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD_SIZE)
    group = types.SimpleNamespace(world_size=WORLD_SIZE, rank_in_group=rank, device_group=dist.group.WORLD)
    for sizes in SIZE_CASES:
        check_gather(group, rank, sizes)
        check_reduce_scatter(group, rank, sizes)
    even = reduce_scatterv(group, torch.ones(6, 2))
    assert torch.equal(even, torch.full((2, 2), 3.0))
    dist.destroy_process_group()


def check_gather(group: types.SimpleNamespace, rank: int, sizes: list[int]) -> None:
    expected = torch.cat([rows_of(other, size) for other, size in enumerate(sizes)])
    mine = rows_of(rank, sizes[rank])
    output = torch.full_like(expected, -1)
    assert torch.equal(all_gatherv(group, mine, sizes, output)[0], expected)
    assert torch.equal(output, expected), "the destination must be filled"
    ids, weights = all_gatherv(group, [mine.long(), mine * 2], sizes)
    assert ids.dtype == torch.int64
    assert torch.equal(ids, expected.long())
    assert torch.equal(weights, expected * 2)


def check_reduce_scatter(group: types.SimpleNamespace, rank: int, sizes: list[int]) -> None:
    parts = [rows_of(other, sum(sizes)) for other in range(WORLD_SIZE)]
    start = sum(sizes[:rank])
    expected = sum(parts)[start : start + sizes[rank]]
    mine = parts[rank].clone()
    output = torch.full_like(expected, -1)
    assert torch.equal(reduce_scatterv(group, mine, sizes=sizes), expected)
    assert torch.equal(reduce_scatterv(group, mine, output, sizes), expected)
    assert torch.equal(output, expected)
    assert torch.equal(mine, parts[rank]), "the input must keep its values"


def test_on_three_ranks(tmp_path: Path) -> None:
    multiprocessing.spawn(run_rank, args=(str(tmp_path / "store"),), nprocs=WORLD_SIZE)


def test_sizes_that_do_not_fit_are_refused() -> None:
    group = types.SimpleNamespace(world_size=3, rank_in_group=0, device_group=None)
    with pytest.raises(ValueError, match="sizes"):
        reduce_scatterv(group, torch.ones(5, 2), sizes=[1, 1, 1])
    with pytest.raises(ValueError, match="evenly"):
        reduce_scatterv(group, torch.ones(5, 2))
    with pytest.raises(ValueError, match="rows"):
        all_gatherv(group, torch.ones(5, 2), sizes=[1, 1, 1])


def test_pynccl_is_switched_off_wherever_it_stands() -> None:
    assert without_pynccl("self", ranks=[[0]], use_pynccl=True)[1] == {"ranks": [[0]], "use_pynccl": False}
    assert without_pynccl("self", [[0]], 0, "gloo", True, False)[0] == ("self", [[0]], 0, "gloo", False, False)
    with pytest.raises(TypeError, match="use_pynccl"):
        without_pynccl("self", [[0]], 0)
