"""Admission beside an unfinished prefill: SGLang keeps one at a time and ends when there are two."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.managers.schedule_policy import AddReqResult

from sglang_dcp.config import DynCpConfig
from sglang_dcp.policy.types import Placement
from sglang_dcp.upstream.router.placement_hint import write_placement
from sglang_dcp.upstream.router.placement_request import describe_request
from sglang_dcp.upstream.step import admission, attached
from sglang_dcp.upstream.step.queues import Queues

PAGE, PROMISED_PAGES = 16, 10


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """Rank 0 of two; ten of its pages are promised to a reservation."""
    participant = SimpleNamespace(rank=0, page_size=PAGE, withheld_pages=PROMISED_PAGES, step=7)
    scheduler = SimpleNamespace(waiting_queue=[], running_batch=SimpleNamespace(batch_is_full=True))
    bound = SimpleNamespace(participant=participant, queues=Queues(), scheduler=scheduler)
    monkeypatch.setattr(attached, "_runtime", bound)
    yield bound


def adder_with(new_chunked_req: object | None = None) -> SimpleNamespace:
    return SimpleNamespace(new_chunked_req=new_chunked_req, memory_budget=SimpleNamespace(total_offset=300, current_offset=300))


def reserved_request(*, ready: bool = True) -> SimpleNamespace:
    return SimpleNamespace(
        dyncp=SimpleNamespace(ready=ready, num_kept=0, num_borrowed=0), dyncp_placement=Placement(0, (1, 0), (64, 64)), kv=SimpleNamespace()
    )


def added(adder: Any, req: Any, has_chunked_req: bool) -> bool:
    calls: list[Any] = []

    def original(*arguments: Any) -> AddReqResult:
        calls.append(arguments)
        return AddReqResult.CONTINUE

    result = admission.add_one_req(original, adder, req, has_chunked_req=has_chunked_req, truncation_align_size=None)
    assert result is (AddReqResult.OTHER if req.dyncp.ready and not calls else AddReqResult.CONTINUE)
    return bool(calls)


def test_a_reserved_request_starts_when_no_prefill_is_unfinished(runtime: SimpleNamespace) -> None:
    assert added(adder_with(), reserved_request(), False)
    assert not added(adder_with(), reserved_request(ready=False), False)


def test_a_reserved_request_waits_for_an_unfinished_prefill(runtime: SimpleNamespace) -> None:
    """The chunk budget may be left over: the other's chunk may have been cut short by memory."""
    assert not added(adder_with(), reserved_request(), True)
    assert not added(adder_with(new_chunked_req=object()), reserved_request(), False)


def test_promises_do_not_shorten_a_local_prefill_that_has_begun(runtime: SimpleNamespace) -> None:
    adder, seen = adder_with(), []

    def original(adder: Any, req: Any) -> None:
        seen.append((adder.memory_budget.total_offset, adder.memory_budget.current_offset))

    admission.add_chunked_req(original, adder, SimpleNamespace(dyncp=None))
    expected = 300 - PROMISED_PAGES * PAGE
    assert seen == [(expected, expected)]
    assert (adder.memory_budget.total_offset, adder.memory_budget.current_offset) == (300, 300)


def arriving(tokens: int) -> tuple[SimpleNamespace, list[str]]:
    refusals: list[str] = []
    return SimpleNamespace(origin_input_ids=range(tokens), set_finish_with_abort=refusals.append, rid="r", extra_key=None), refusals


def test_without_a_placement_a_prompt_beyond_the_pool_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would wait for ever, and those behind it with it."""
    bound = SimpleNamespace(participant=SimpleNamespace(rank=1, page_size=PAGE, num_pages=64), queues=Queues())
    monkeypatch.setattr(attached, "_runtime", bound)
    req, refusals = arriving(63 * PAGE)
    admission.attach_placement(req, None, SimpleNamespace(kv_hints=None))
    assert not refusals and req.dyncp_placement is None and not req.dyncp_placement_flexible
    req, refusals = arriving(63 * PAGE + 1)
    admission.attach_placement(req, None, SimpleNamespace(kv_hints=None))
    assert len(refusals) == 1 and "1009 tokens" in refusals[0] and "1008 tokens" in refusals[0]
    assert bound.queues.placements_taken_in == 0


def test_an_arriving_placement_is_taken_in_by_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    bound, scheduler = SimpleNamespace(queues=Queues()), SimpleNamespace(running_batch=SimpleNamespace(batch_is_full=True))
    monkeypatch.setattr(attached, "_runtime", bound)
    for number in (1, 2, 5):
        req, refusals = arriving(3000)
        hints = write_placement(None, Placement(0, (1, 0), (1600, 1400)), flexible=True, number=number)
        admission.attach_placement(req, scheduler, SimpleNamespace(kv_hints=hints))
        assert not scheduler.running_batch.batch_is_full, "it does not wait for what a local one waits for"
        assert not refusals and bound.queues.placements_taken_in == number
        assert req.dyncp_placement.shards == (1, 0) and req.dyncp_placement_flexible and req.skip_radix_cache_insert


# ---- what a local request is charged

POOL = 1024
CONFIGS = [({}, 256), ({"max_degree": 2}, 256), ({"policy": "local"}, 900), ({"max_degree": 1}, 900)]


def local_request(prompt: int, new: int, generated: int = 0, *, ignore_eos: bool = True) -> SimpleNamespace:
    params = SimpleNamespace(max_new_tokens=new, ignore_eos=ignore_eos)
    ids = {"origin_input_ids": range(prompt), "output_ids": range(generated)}
    return SimpleNamespace(**ids, sampling_params=params, dyncp=None, dyncp_placement=None)


@pytest.fixture(params=CONFIGS, ids=str)
def cluster(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """One of four instances. (largest degree, tokens that an output of 900 is expected to have)."""
    settings, expected = request.param
    config = DynCpConfig(**settings).resolve(4)
    participant = SimpleNamespace(rank=0, page_size=PAGE, num_pages=POOL // PAGE, num_instances=4)
    participant.limits = config.split_limits(4, participant.num_pages)
    monkeypatch.setattr(attached, "_runtime", SimpleNamespace(participant=participant, config=config, queues=Queues()))
    return participant.limits.max_degree, expected


def test_admission_charges_what_placement_expects(cluster: tuple[int, int]) -> None:
    largest_degree, expected = cluster
    request = describe_request(64, 900, {}, largest_degree * POOL, page_size=16, largest_degree=largest_degree)
    assert request.expected_new_tokens == expected
    req, seen = local_request(64, 900), []

    def original(adder: Any, req: Any, *_: Any) -> AddReqResult:
        seen.append((req.sampling_params.max_new_tokens, req.sampling_params.ignore_eos))
        return AddReqResult.CONTINUE

    admission.add_one_req(original, adder_with(), req, False, None)
    assert seen == [(min(expected, POOL - 64 - 2 * PAGE - 1), largest_degree == 1)]
    assert (req.sampling_params.max_new_tokens, req.sampling_params.ignore_eos) == (900, True)


def test_a_running_request_is_charged_what_it_is_expected_to_generate_yet(cluster: tuple[int, int]) -> None:
    _, expected = cluster

    def original(adder: Any, req: Any) -> int:
        assert req.sampling_params.ignore_eos
        return req.sampling_params.max_new_tokens - len(req.output_ids)

    for prompt, new, generated in ((64, 900, 0), (64, 900, 500), (64, 900, 800), (64, 20, 0), (64, 20, 20), (900, 900, 100)):
        left = min(new - generated, POOL - prompt - 2 * PAGE - 1 - generated)
        charged = admission.running_offset(original, adder_with(), local_request(prompt, new, generated))
        assert charged == max(0, min(left, 256) if expected == 256 else left)


def test_a_local_request_without_room_is_noted_from_its_first_time_on(runtime: SimpleNamespace) -> None:
    runtime.participant.num_pages, runtime.participant.num_instances = POOL // PAGE, 2
    runtime.participant.limits = DynCpConfig().split_limits(2, POOL // PAGE)
    req, outcome = local_request(64, 900), [AddReqResult.NO_TOKEN]
    for step in (7, 9):
        runtime.participant.step = step
        assert admission.add_one_req(lambda *_: outcome[0], adder_with(), req, False, None) is AddReqResult.NO_TOKEN
        assert runtime.queues.blocked is req and req.dyncp_blocked_since == 7
    runtime.scheduler.waiting_queue = [req, SimpleNamespace(dyncp_placement=Placement(0, (1, 0), (64, 64)))]
    assert admission.add_one_req(lambda *_: outcome[0], adder_with(), req, False, None) is AddReqResult.CONTINUE, "one of them is sharded"
    outcome[0] = AddReqResult.CONTINUE
    admission.add_one_req(lambda *_: outcome[0], adder_with(), req, False, None)
    assert runtime.queues.blocked is None and req.dyncp_blocked_since is None


def test_a_request_that_left_the_queue_gives_back_beside_another_of_its_id(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tokenizer workers may be given one id: the queue's limit or a timeout takes one of the two."""
    ended: list[Any] = []
    monkeypatch.setattr(admission.retention, "end_waiting", lambda _runtime, req: ended.append(req))
    left, stays = (SimpleNamespace(rid="same", kv=SimpleNamespace(holds_kv=False), dyncp=SimpleNamespace(handle=h)) for h in (1, 2))
    queues = Queues()
    queues.waiting.update({1: left, 2: stays})
    admission.sweep_waiting(SimpleNamespace(queues=queues, scheduler=SimpleNamespace(waiting_queue=[stays])))  # type: ignore[arg-type]
    assert (ended, list(queues.waiting)) == ([left], [2])
