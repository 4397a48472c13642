"""Pages that admission leaves to those that run."""

import pytest

from sglang_dcp.policy.growth import kept_for_growth


@pytest.mark.parametrize(
    ("running", "page_size", "pool_pages", "kept"),
    [
        (0, 64, 12_288, 0),
        (6, 64, 12_288, 48),
        (100, 64, 12_288, 384),
        (3, 100, 12_288, 18),
        (1, 16, 64, 2),
        (5, 16, 31, 0),
    ],
    ids=["nobody runs", "8 pages each", "at most a part in 32", "a part of a page", "a small pool", "a tiny one"],
)
def test_pages_that_no_new_request_gets(running: int, page_size: int, pool_pages: int, kept: int) -> None:
    assert kept_for_growth(running, page_size, pool_pages) == kept
