"""The stacked merge against the oracle, outputs poisoned first."""

from __future__ import annotations

import pytest
import torch
from sgl_kernel_dcp import merge_stacked

from sglang_dcp.dataflow.merge import merge_partial_states

pytestmark = pytest.mark.gpu


def run(outputs: torch.Tensor, lses: torch.Tensor) -> None:
    merged = torch.full(outputs.shape[1:], float("nan"), dtype=torch.bfloat16, device="cuda:0")
    merged_lse = torch.full(lses.shape[1:], float("nan"), device="cuda:0")
    merge_stacked(outputs, lses, merged, merged_lse)
    expected = merge_partial_states(outputs.float(), lses.masked_fill(lses == float("inf"), float("-inf")))
    assert not merged.isnan().any()
    torch.testing.assert_close(merged.float(), expected.output, atol=1e-2, rtol=8e-3)
    assert torch.equal(merged_lse == float("-inf"), expected.lse == float("-inf"))
    finite = expected.lse != float("-inf")
    torch.testing.assert_close(merged_lse[finite], expected.lse[finite], atol=2e-5, rtol=2e-5)
    without_lse = torch.full_like(merged, float("nan"))
    merge_stacked(outputs, lses, without_lse)
    assert torch.equal(merged, without_lse)


@pytest.mark.parametrize(("heads", "dim"), [(128, 512), (64, 128), (20, 128), (40, 128), (1, 8), (128, 64), (3, 4096), (65, 96)])
@pytest.mark.parametrize("partials", [1, 2, 3, 8, 9, 16])
@pytest.mark.parametrize("rows", [1, 5, 70])
def test_merge_equals_the_oracle(library, rows: int, partials: int, heads: int, dim: int) -> None:
    torch.manual_seed(rows * 100 + partials)
    outputs = torch.randn(partials, rows, heads, dim, device="cuda:0").to(torch.bfloat16)
    lses = torch.randn(partials, rows, heads, device="cuda:0") * 20
    run(outputs, lses)
    neutral = torch.rand(partials, rows, heads, device="cuda:0") < 0.5
    run(outputs.masked_fill(neutral.unsqueeze(-1), float("nan")), lses.masked_fill(neutral, float("-inf")))
    run(torch.full_like(outputs, float("nan")), torch.full_like(lses, float("-inf")))
    run(outputs.masked_fill(neutral.unsqueeze(-1), float("nan")), lses.masked_fill(neutral, float("inf")))
    run(outputs, torch.full_like(lses, -3e4))


@pytest.mark.parametrize(("partials", "rows"), [(0, 3), (4, 0), (0, 0)])
def test_nothing_to_merge_is_neutral(library, partials: int, rows: int) -> None:
    merged = torch.full((rows, 8, 64), 5.0, dtype=torch.bfloat16, device="cuda:0")
    merged_lse = torch.full((rows, 8), 5.0, device="cuda:0")
    outputs = torch.empty(partials, rows, 8, 64, dtype=torch.bfloat16, device="cuda:0")
    merge_stacked(outputs, torch.empty(partials, rows, 8, device="cuda:0"), merged, merged_lse)
    assert bool((merged == 0).all()) and bool((merged_lse == float("-inf")).all())


@pytest.mark.parametrize(
    ("outputs", "lses", "text"),
    [
        ((17, 1, 8, 64), (17, 1, 8), "partials\\) is 17, must be 0 to 16"),
        ((2, 1, 8, 60), (2, 1, 8), "multiple of 16"),
        ((2, 1, 8, 64), (2, 1, 7), "lses has size 7 in dimension 2, must be 8"),
    ],
)
def test_wrong_sizes_are_refused_by_name(library, outputs: tuple[int, ...], lses: tuple[int, ...], text: str) -> None:
    stacked = torch.zeros(outputs, dtype=torch.bfloat16, device="cuda:0")
    merged = torch.zeros(outputs[1:], dtype=torch.bfloat16, device="cuda:0")
    with pytest.raises(ValueError, match=text):
        merge_stacked(stacked, torch.zeros(lses, device="cuda:0"), merged)
