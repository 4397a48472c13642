"""The price of attention beside every kernel that was measured, and that what ships is what the tables give."""

from __future__ import annotations

import pytest

from benchmark.kernels.measured import Shape, by_shape, measured, price_us, table_text
from sglang_dcp.policy.attention_table import STOCK_SPLIT, TABLE_FOLDER, table_constants

LONG = 100_000


@pytest.mark.parametrize("path", sorted(TABLE_FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_what_ships_is_fitted_to_the_results(path) -> None:
    assert path.read_text() == table_text(path.stem), "run python -m benchmark.kernels.measured"


@pytest.mark.parametrize("shape", list(by_shape()), ids=lambda shape: f"{shape.card}, {shape.name}, {shape.split}")
def test_every_measured_row_is_priced(shape: Shape) -> None:
    """Within 10 % where long rows are split; where they are not, within 5 % for a long row, and 25 % for one of a few microseconds."""
    errors = [price_us(item) / item.row.microseconds - 1 for item in by_shape()[shape]]
    if shape.split != STOCK_SPLIT:
        assert max(map(abs, errors)) <= 0.10
        return
    long = [error for error, item in zip(errors, by_shape()[shape], strict=True) if item.row.longest_row >= LONG]
    assert max(map(abs, errors)) <= 0.25 and max(map(abs, long)) <= 0.05


def test_a_price_that_knows_tokens_alone_misses_a_long_row_of_stock_by_far() -> None:
    """What made the policy drift (docs/log.md): the same tokens, priced by their bytes."""
    worst = max((item for item in measured() if item.shape.split == STOCK_SPLIT), key=lambda item: item.row.microseconds)
    constants = table_constants("h200", latent=False, num_heads=64, kv_bytes=worst.shape.kv_bytes, kv_dtype="bfloat16")
    assert worst.row.microseconds > 7 * constants["attention_us_per_token"] * worst.row.tokens


def test_shapes_between_are_brought_to_size_and_latent_ones_are_not() -> None:
    asked = {"latent": False, "num_heads": 96, "kv_dtype": "bfloat16"}
    eight, sixteen = (table_constants("h200", **asked, kv_bytes=width) for width in (4096, 8192))
    assert sixteen["attention_us_per_token"] == 2 * eight["attention_us_per_token"]
    assert sixteen["attention_fixed_us"] == eight["attention_fixed_us"]
    assert table_constants("h100", latent=True, num_heads=64, kv_bytes=1152, kv_dtype="bfloat16") == {}
    assert table_constants("b200", **asked, kv_bytes=4096) == {}
    assert table_constants("h100", **asked | {"kv_dtype": "fp8_e4m3"}, kv_bytes=4096) == {}
