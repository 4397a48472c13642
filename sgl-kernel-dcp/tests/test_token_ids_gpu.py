"""Token ids of decode steps: the kernel against torch, output poisoned first."""

from __future__ import annotations

import random

import pytest
import torch
from sgl_kernel_dcp import FROM_POOL, decode_token_ids

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("num_rows", [1, 5, 128, 1024, 3000])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 1.0])
def test_ids_equal_a_loop(library, num_rows: int, share: float) -> None:
    rng = random.Random(num_rows)
    last = torch.randint(0, 1 << 30, (num_rows,), dtype=torch.int32, device="cuda:0")
    free_pages = torch.randperm(10_000, device="cuda:0")[: num_rows + 1]
    rows = [row for row in range(num_rows) if rng.random() < share]
    rng.shuffle(rows)
    ids = [FROM_POOL if rng.random() < 0.5 else rng.randrange(1 << 40) for _ in rows]
    expected, taken = (last.long() + 1).tolist(), iter(free_pages.tolist())
    for row, given in zip(rows, ids, strict=True):
        expected[row] = next(taken) * 64 if given == FROM_POOL else given
    out = torch.full((num_rows,), -77, device="cuda:0")
    decode_token_ids(last, free_pages, 64, rows, ids, out)
    assert out.tolist() == expected


@pytest.mark.parametrize(
    ("rows", "ids", "message"),
    [
        ([5], [1], "a row that begins a page is 5, must be 0 to 4"),
        ([-1], [1], "a row that begins a page is -1"),
        ([1, 2], [1], "the number of ids is 1, must be 2 to 2"),
        ([1, 2, 3], [FROM_POOL] * 3, "pages taken is 3, must be 0 to 2"),
    ],
)
def test_what_is_out_of_bounds_is_refused_by_name(library, rows: list[int], ids: list[int], message: str) -> None:
    last, free_pages = torch.zeros(5, dtype=torch.int32, device="cuda:0"), torch.arange(2, device="cuda:0")
    with pytest.raises(ValueError, match=message):
        decode_token_ids(last, free_pages, 16, rows, ids, torch.zeros(5, dtype=torch.int64, device="cuda:0"))
