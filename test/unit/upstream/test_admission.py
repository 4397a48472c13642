"""Admission beside an unfinished prefill: SGLang keeps one at a time and ends when there are two."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.managers.schedule_policy import AddReqResult

from sglang_dcp.policy.types import Placement
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
