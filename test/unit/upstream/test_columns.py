"""Our control columns behind SGLang's row of a step."""

from types import SimpleNamespace

import pytest
import torch

from sglang_dcp.upstream.step import binding as bindings
from sglang_dcp.upstream.step.binding import Binding
from sglang_dcp.upstream.step.columns import NUM_COLUMNS, WidenedRow
from sglang_dcp.upstream.step.sync import fallback_columns

OWN = [3, 2, 2**31 - 2, 17, 5, 900_000, 128, 2**40]


def test_rows_of_two_steps() -> None:
    """Values are those of the step; a row of another width than the first step's is an error."""
    row = WidenedRow()
    for _ in range(2):
        stock = torch.randint(0, 1000, (11,))
        assert row.widen(stock, OWN).tolist() == [*stock.tolist(), *OWN]
        assert stock.numel() == 11, "SGLang's own row stays as it is"
    with pytest.raises(RuntimeError, match="11"):
        row.widen(torch.arange(12), OWN)


def test_other_element_types_keep_their_type() -> None:
    stock, own = torch.arange(11, dtype=torch.int32), [*OWN[:7], 4]
    wide = WidenedRow().widen(stock, own)
    assert wide.dtype == torch.int32 and wide.tolist() == [*range(11), *own]


def test_the_row_of_a_rank_that_is_gone_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang makes it of constants in every step; it ends in zeros of ours."""
    binding = Binding(None, SimpleNamespace(), None, None)  # type: ignore[arg-type]
    monkeypatch.setattr(bindings, "_binding", binding)
    first, second = (fallback_columns(torch.arange(11), None, "cpu") for _ in range(2))
    assert first.tolist() == [*range(11), *[0] * NUM_COLUMNS] and second is first
