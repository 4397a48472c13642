"""Admission beside an unfinished prefill: SGLang keeps one at a time and ends when there are two."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.managers.schedule_policy import AddReqResult

from sglang_dcp.policy.types import Placement
from sglang_dcp.upstream.router.placement_hint import write_placement
from sglang_dcp.upstream.step import admission

PAGE, PROMISED_PAGES = 16, 10


@pytest.fixture
def binding(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """Rank 0 of two; ten of its pages are promised to a reservation."""
    bound = SimpleNamespace(instance=SimpleNamespace(rank=0, page_size=PAGE, promised=(PROMISED_PAGES, 0)), waiting={})
    monkeypatch.setattr(admission, "current", lambda: bound)
    yield bound


def adder_with(new_chunked_req: object | None = None) -> SimpleNamespace:
    return SimpleNamespace(new_chunked_req=new_chunked_req, memory_budget=SimpleNamespace(total_offset=300, current_offset=300))


def reserved_request(*, ready: bool = True) -> SimpleNamespace:
    return SimpleNamespace(dyncp=SimpleNamespace(ready=ready), dyncp_placement=Placement(0, (1, 0), (64, 64)))


def added(adder: Any, req: Any, has_chunked_req: bool) -> bool:
    calls: list[Any] = []

    def original(*arguments: Any) -> AddReqResult:
        calls.append(arguments)
        return AddReqResult.CONTINUE

    result = admission.add_one_req(original, adder, req, has_chunked_req=has_chunked_req, truncation_align_size=None)
    assert result is (AddReqResult.OTHER if req.dyncp.ready and not calls else AddReqResult.CONTINUE)
    return bool(calls)


def test_a_reserved_request_starts_when_no_prefill_is_unfinished(binding: SimpleNamespace) -> None:
    assert added(adder_with(), reserved_request(), False)
    assert not added(adder_with(), reserved_request(ready=False), False)


def test_a_reserved_request_waits_for_an_unfinished_prefill(binding: SimpleNamespace) -> None:
    """The chunk budget may be left over: the other's chunk may have been cut short by memory."""
    assert not added(adder_with(), reserved_request(), True)
    assert not added(adder_with(new_chunked_req=object()), reserved_request(), False)


def test_promises_do_not_shorten_a_local_prefill_that_has_begun(binding: SimpleNamespace) -> None:
    adder, seen = adder_with(), []

    def original(adder: Any, req: Any) -> None:
        seen.append((adder.memory_budget.total_offset, adder.memory_budget.current_offset))

    admission.add_chunked_req(original, adder, SimpleNamespace(dyncp=None))
    expected = 300 - PROMISED_PAGES * PAGE
    assert seen == [(expected, expected)]
    assert (adder.memory_budget.total_offset, adder.memory_budget.current_offset) == (300, 300)


def arriving(tokens: int) -> tuple[SimpleNamespace, list[str]]:
    refusals: list[str] = []
    return SimpleNamespace(origin_input_ids=range(tokens), set_finish_with_abort=refusals.append, rid="r"), refusals


def test_without_a_placement_a_prompt_beyond_the_pool_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would wait for ever, and those behind it with it."""
    bound = SimpleNamespace(instance=SimpleNamespace(rank=1, page_size=PAGE, num_pages=64), placements_taken_in=0)
    monkeypatch.setattr(admission, "current", lambda: bound)
    req, refusals = arriving(63 * PAGE)
    admission.attach_placement(req, None, SimpleNamespace(kv_hints=None))
    assert not refusals and req.dyncp_placement is None and not req.dyncp_placement_flexible
    req, refusals = arriving(63 * PAGE + 1)
    admission.attach_placement(req, None, SimpleNamespace(kv_hints=None))
    assert len(refusals) == 1 and "1009 tokens" in refusals[0] and "1008 tokens" in refusals[0]
    assert bound.placements_taken_in == 0


def test_an_arriving_placement_is_taken_in_by_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    bound = SimpleNamespace(placements_taken_in=0)
    monkeypatch.setattr(admission, "current", lambda: bound)
    for number in (1, 2, 5):
        req, refusals = arriving(3000)
        hints = write_placement(None, Placement(0, (1, 0), (1600, 1400)), flexible=True, number=number)
        admission.attach_placement(req, None, SimpleNamespace(kv_hints=hints))
        assert not refusals and bound.placements_taken_in == number
        assert req.dyncp_placement.shards == (1, 0) and req.dyncp_placement_flexible and req.skip_radix_cache_insert
