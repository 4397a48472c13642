"""Which mixes and rates a call of the comparison measures."""

from __future__ import annotations

import pytest

from benchmark.headline.plan import MixRates as Mix, parse_mixes


def test_every_share_has_its_rates() -> None:
    assert parse_mixes("0.03,0", "6,4/8,12") == [Mix(0.03, (4.0, 6.0)), Mix(0.0, (8.0, 12.0))]
    assert parse_mixes("0.01,0.05", "4") == [Mix(0.01, (4.0,)), Mix(0.05, (4.0,))]


@pytest.mark.parametrize(("shares", "rates"), [("0.03", "4/6"), ("0,0.01,0.03", "4/6"), ("x", "4"), ("0.03", "4,")])
def test_lists_that_do_not_fit_are_refused(shares: str, rates: str) -> None:
    with pytest.raises(ValueError):
        parse_mixes(shares, rates)
