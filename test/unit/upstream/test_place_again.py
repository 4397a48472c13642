"""Where a request that was retracted starts over."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sglang_dcp.config import DynCpConfig
from sglang_dcp.policy.types import Placement
from sglang_dcp.upstream.step.admission import page_segments
from sglang_dcp.upstream.step.retraction import place_again

PAGES, PAGE, HOME = 16, 4, 0


def again(
    total: int, shards: tuple[int, ...] | None, used: tuple[int, ...] = (64, 0, 0, 0), *, flexible: bool = True, **settings: Any
) -> Any:
    """The request behind a retraction, with `total` tokens and shards of a page each (tail last), and what it asks for."""
    limits = DynCpConfig(**settings).resolve(4).split_limits(4, PAGES)
    participant = SimpleNamespace(rank=HOME, page_size=PAGE, num_pages=PAGES, num_instances=4, limits=limits, kv_tokens=used)
    placement = None if shards is None else Placement(HOME, shards, (PAGE,) * len(shards))
    req = SimpleNamespace(rid="r", origin_input_ids=range(total - 3), output_ids=range(3), dyncp_placement=placement)
    req.dyncp_placement_flexible = flexible and shards is not None
    place_again(SimpleNamespace(participant=participant), req)  # type: ignore[arg-type]
    asked = None if req.dyncp_placement is None or req.dyncp_placement.is_local else page_segments(req, PAGE, limits)
    return SimpleNamespace(placement=req.dyncp_placement, flexible=req.dyncp_placement_flexible, asked=asked, limits=limits)


@pytest.mark.parametrize("shards", [(1, 0), (3, 2, 1, 0), (2,)])
def test_a_request_that_fits_one_pool_asks_for_one(shards: tuple[int, ...]) -> None:
    """Three instances are idle; over all of them it would cost an exchange in each of its steps."""
    found = again(20, shards)
    assert found.asked == ((1, 6),) and found.flexible


def test_it_is_local_again_where_its_home_has_room() -> None:
    assert again(20, (1, 0), used=(0, 0, 0, 0)).placement.is_local
    assert again(20, (1, 0), used=(60, 60, 60, 60)).placement.is_local, "no instance has room: it waits at home"
    assert again(20, None).placement is None and again(20, (0,)).placement.is_local


def test_one_beyond_a_pool_asks_for_as_few_as_have_room() -> None:
    found = again(90, (1, 0), used=(64, 0, 0, 0))
    assert {rank for rank, _ in found.asked} == {1, 2} and sum(pages for _, pages in found.asked) == 24


@pytest.mark.parametrize("total", [20, 60, 90, 120])
def test_a_pin_stays(total: int) -> None:
    found = again(total, (2, 0), flexible=False, max_degree=2)
    assert found.placement.shards == (2, 0) and not found.flexible
    assert [rank for rank, _ in found.asked] == [2, 0]


def test_a_pinned_one_gets_shards_only_beyond_those_it_has() -> None:
    assert again(90, (0,), flexible=False).placement.shards == (1, 0)
    found = again(180, (2, 0), flexible=False)
    assert [rank for rank, _ in found.asked] == [2, 1, 0] and not found.flexible


@pytest.mark.parametrize(
    "settings", [{"max_degree": 2}, {"max_guest_fraction": 0.5}, {"num_nodes": 2}, {"max_guest_fraction": 0.25, "num_nodes": 2}]
)
@pytest.mark.parametrize("flexible", [True, False])
def test_every_limit_holds(settings: dict[str, Any], flexible: bool) -> None:
    for used in ((64, 0, 0, 0), (60, 60, 10, 0), (0, 64, 64, 64)):
        limits = DynCpConfig(**settings).resolve(4).split_limits(4, PAGES)
        for total in range(5, (limits.reach_pages - 1) * PAGE):
            found = again(total, (1, 0), used, flexible=flexible, **settings)
            if found.asked is None:
                continue
            assert limits.fits(HOME, found.asked)
            assert {rank for rank, _ in found.asked} <= set(limits.scope(HOME, sum(pages for _, pages in found.asked)))
