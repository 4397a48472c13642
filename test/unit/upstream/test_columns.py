"""Our control columns behind SGLang's row of a step."""

import pytest
import torch

from sglang_dcp.upstream.columns import NUM_COLUMNS, WidenedRow

OWN = [3, 2, 2**31 - 2, 17, 5, 900_000, 128, 2**40]


def test_rows_of_two_steps() -> None:
    """Values are those of the step; SGLang's row may have grown, as another release's would."""
    row = WidenedRow()
    for width in (11, 11, 13):
        stock = torch.randint(0, 1000, (width,))
        assert row.widen(stock, OWN).tolist() == [*stock.tolist(), *OWN]
        assert stock.numel() == width, "SGLang's own row stays as it is"


def test_a_row_without_columns_of_ours_ends_in_zeros() -> None:
    row, stock = WidenedRow(), torch.arange(11)
    for _ in range(2):
        assert row.widen(stock, None).tolist() == [*range(11), *[0] * NUM_COLUMNS]


@pytest.mark.parametrize("own", [OWN[:7] + [4], None])
def test_other_element_types_keep_their_type(own: list[int] | None) -> None:
    stock = torch.arange(11, dtype=torch.int32)
    wide = WidenedRow().widen(stock, own)
    assert wide.dtype == torch.int32 and wide.tolist() == [*range(11), *(own or [0] * NUM_COLUMNS)]
