"""A row that sat out samples as if it had not: SGLang's own batches, without a model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.managers.schedule_batch import FINISH_ABORT, ScheduleBatch
from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode, ForwardMode
from sglang.srt.sampling import sampling_batch_info
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo
from sglang.srt.sampling.sampling_params import SamplingParams

from sglang_dcp.upstream.step import attached, retraction
from sglang_dcp.upstream.step.penalties import count_earlier_output, count_in_turn
from sglang_dcp.upstream.step.queues import Queues
from sglang_dcp.upstream.step.sitting_out import rejoin, sit_out

VOCAB, EOS = 12, 11
PENALIZED: dict[str, Any] = {"frequency_penalty": 0.5, "presence_penalty": 0.25, "repetition_penalty": 1.5, "min_new_tokens": 4}


@pytest.fixture(autouse=True)
def stock_context(monkeypatch: pytest.MonkeyPatch) -> None:
    features = SimpleNamespace(enable_custom_logit_processor=False, enable_watermark=False)
    context = SimpleNamespace(deterministic=SimpleNamespace(enable_deterministic_inference=True), features=features)
    monkeypatch.setattr(sampling_batch_info, "get_exec", lambda: context)


class FakeReq(SimpleNamespace):
    """The part of SGLang's Req that its batches read."""

    __hash__ = object.__hash__
    __eq__ = object.__eq__

    def finished(self) -> bool:
        return False


def request(slot: int, output: list[int], *, top: int = 0, ids: list[int] | None = None, grammar: Any = None, **params: Any) -> FakeReq:
    return FakeReq(
        rid=f"r{slot}",
        slot=slot,
        origin_input_ids=[1, 2],
        output_ids=output,
        sampling_params=SamplingParams(**params),
        eos_token_ids={EOS},
        tokenizer=SimpleNamespace(additional_stop_token_ids=None, eos_token_id=EOS),
        custom_logit_processor=None,
        return_sampling_mask=False,
        sampling_logprobs_mode=None,
        return_logprob=top > 0,
        return_hidden_states=False,
        return_hidden_states_mode=CaptureHiddenMode.NULL,
        top=top,
        ids=ids,
        grammar=grammar,
        dyncp=None,
        dyncp_parked_row=None,
        dyncp_num_late=0,
        to_finish=None,
        kv=SimpleNamespace(kv_allocated_len=4),
    )


def batch_of(reqs: list[FakeReq]) -> ScheduleBatch:
    batch = ScheduleBatch(reqs=reqs, forward_mode=ForwardMode.DECODE, device="cpu")
    batch.model_config = SimpleNamespace(is_encoder_decoder=False)
    slots = torch.tensor([req.slot for req in reqs])
    batch.req_pool_indices, batch.req_pool_indices_cpu = slots, slots.clone()
    batch.seq_lens, batch.seq_lens_cpu, batch.orig_seq_lens = 10 * slots, 10 * slots, 10 * slots
    batch.return_logprob = any(req.return_logprob for req in reqs)
    batch.has_grammar = any(req.grammar for req in reqs)
    batch.return_hidden_states_mode = CaptureHiddenMode.NULL
    batch.top_logprobs_nums = [req.top for req in reqs]
    batch.token_ids_logprobs = [req.ids for req in reqs]
    batch.sampling_info = SamplingBatchInfo.from_schedule_batch(batch, VOCAB)
    return batch


def decode(batch: ScheduleBatch, tokens: dict[int, int]) -> None:
    """One more output token for each row."""
    for req in batch.reqs:
        req.output_ids = [*req.output_ids, tokens[req.slot]]
    if batch.sampling_info.penalizer_orchestrator.is_required:
        batch.cumulate_penalty_output_tokens()


def biases(batch: ScheduleBatch) -> dict[int, torch.Tensor]:
    """What sampling makes of logits of one, by row."""
    logits = torch.ones(len(batch.reqs), VOCAB)
    info = batch.sampling_info
    if info.penalizer_orchestrator.is_required:
        info.update_penalties()
        logits = (logits + info.acc_additive_penalties) / (1.0 if info.acc_scaling_penalties is None else info.acc_scaling_penalties)
    if info.logit_bias is not None:
        logits = logits + info.logit_bias
    return {req.slot: row for req, row in zip(batch.reqs, logits, strict=True)}


def runtime_of(parked: list[FakeReq]) -> Any:
    return SimpleNamespace(queues=Queues(parked=parked))


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sglang_dcp.upstream.step.sitting_out.has_room", lambda runtime, req: True)


MANY = [
    {"top": 2, "ids": [3], "logit_bias": {"7": 5.0}, **PENALIZED},
    {},
    {"temperature": 0.25, "min_new_tokens": 6, "frequency_penalty": 1.0, "sampling_seed": 9},
    {"top": 1, "presence_penalty": 1.0, "grammar": object()},
]


@pytest.mark.parametrize("leave", [{0}, {1}, {0, 2}, {2, 3}, {0, 1, 2, 3}])
def test_a_row_comes_back_as_it_left(leave: set[int], room: None) -> None:
    """Beside the same rows that never left: every token counts, at whatever side of the batch the penalties are."""
    alone, moved = (batch_of([request(slot, [], **params) for slot, params in enumerate(MANY)]) for _ in range(2))
    for token in (3, 3, 5):
        for batch in (alone, moved):
            decode(batch, dict.fromkeys(range(4), token))
    runtime = runtime_of([])
    sit_out(runtime, moved, leave)
    assert [req.slot for req in moved.reqs] == [slot for slot in range(4) if slot not in leave]
    if not moved.is_empty():
        decode(moved, dict.fromkeys(range(4), 6))  # the others go on
    back = rejoin(runtime, moved)
    assert runtime.queues.parked == [] and all(req.dyncp_parked_row is None for req in back.reqs)
    kept, now = biases(alone), biases(back)
    for slot in leave:
        assert torch.equal(now[slot], kept[slot]), slot
    for index, req in enumerate(back.reqs):
        assert (back.top_logprobs_nums[index], back.token_ids_logprobs[index]) == (req.top, req.ids)
        assert int(back.seq_lens[index]) == int(back.seq_lens_cpu[index]) == 10 * req.slot == 10 * int(back.req_pool_indices[index])
        assert float(back.sampling_info.temperatures[index]) == req.sampling_params.temperature
        assert int(back.sampling_info.sampling_seed[index]) == (req.sampling_params.sampling_seed or 42)
    assert back.has_grammar and back.return_logprob
    decode(back, dict.fromkeys(range(4), 4))


def test_min_new_tokens_counts_through_sitting_out(room: None) -> None:
    batch, runtime = batch_of([request(0, [], min_new_tokens=4)]), runtime_of([])
    banned = []
    for _ in range(6):
        decode(batch, {0: 3})
        sit_out(runtime, batch, {0})
        batch = rejoin(runtime, batch)
        banned.append(bool(torch.isinf(biases(batch)[0][EOS])))
    assert banned == [True, True, True, False, False, False]


def test_custom_parameters_of_a_row_stay_with_it(room: None) -> None:
    batch, runtime = batch_of([request(slot, []) for slot in range(3)]), runtime_of([])
    info = batch.sampling_info
    entry = sampling_batch_info.ProcessorEntry(processor=object(), rows=[0, 2], indices=torch.tensor([0, 2]))  # type: ignore[arg-type]
    info.has_custom_logit_processor, info.custom_logit_processor, info.custom_params = True, {1: entry}, [{"a": 0}, None, {"a": 2}]
    sit_out(runtime, batch, {0, 1})
    back = rejoin(runtime, batch)
    assert [req.slot for req in back.reqs] == [2, 0, 1]
    assert back.sampling_info.custom_params == [{"a": 2}, {"a": 0}, None]
    assert back.sampling_info.custom_logit_processor[1].rows == [0, 1]


def token_of(slot: int, number: int) -> int:
    """Some tokens come twice."""
    return (3 * slot + number * number) % 10


class Overlapped:
    """Steps as with the overlap schedule: each is prepared, and sampled, before the result of the one before has come."""

    def __init__(self, batch: ScheduleBatch) -> None:
        self.batch = batch
        self.pending = list(batch.reqs)  # their first tokens, of the prefill
        self.used: dict[tuple[int, int], torch.Tensor] = {}

    def step(self, runtime: Any, leave: set[int]) -> None:
        """leave: slots that sit this step out. used: what their penalties made of the logits of each token."""
        self.batch = rejoin(runtime, self.batch)
        places = {place for place, req in enumerate(self.batch.reqs) if req.slot in leave}
        if places:
            sit_out(runtime, self.batch, places)
        numbers = {req.slot: len(req.output_ids) + (req in self.pending) for req in self.batch.reqs}
        if not self.batch.is_empty():
            if self.batch.sampling_info.penalizer_orchestrator.is_required:
                count_in_turn(ScheduleBatch.cumulate_penalty_output_tokens, self.batch)
            self.used |= {(slot, numbers[slot]): row for slot, row in biases(self.batch).items()}
        for req in self.pending:
            req.output_ids.append(token_of(req.slot, len(req.output_ids)))
        self.pending = list(self.batch.reqs)


@pytest.mark.parametrize("leaves", [[{0}], [{0}, {0}], [set(), {0, 2}, {2}, set(), {1, 2}], [{3}, set(), {3}, set(), {0, 1, 2, 3}, {1}]])
def test_with_overlap_each_token_is_counted_once_and_in_its_step(leaves: list[set[int]], room: None) -> None:
    alone, moved = (Overlapped(batch_of([request(slot, [], **params) for slot, params in enumerate(MANY)])) for _ in range(2))
    for _ in range(12):
        alone.step(runtime_of([]), set())
    runtime = runtime_of([])
    for leave in [set(), set(), *leaves, set(), set(), set()]:
        moved.step(runtime, leave)
    assert {slot for slot, _ in moved.used} == {0, 1, 2, 3}
    for key, row in moved.used.items():
        assert torch.equal(row, alone.used[key]), key


def test_with_overlap_a_request_that_starts_over_counts_its_last_token_in_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attached, "_runtime", object())
    never = Overlapped(batch_of([request(0, [], **PENALIZED)]))
    for _ in range(6):
        never.step(runtime_of([]), set())
    output = [token_of(0, number) for number in range(3)]
    batch = batch_of([request(0, output, **PENALIZED)])
    batch.enable_overlap, batch.prefix_lens, batch.extend_lens = True, [0], [5]
    count_earlier_output(None, batch)
    assert torch.equal(biases(batch)[0], never.used[0, 3])
    again = Overlapped(batch)
    for _ in range(2):
        again.step(runtime_of([]), set())
    assert torch.equal(again.used[0, 4], never.used[0, 4]) and torch.equal(again.used[0, 5], never.used[0, 5])


@pytest.mark.parametrize("place", [0, 1])
def test_penalties_count_the_output_of_a_request_that_starts_over(monkeypatch: pytest.MonkeyPatch, place: int) -> None:
    monkeypatch.setattr(attached, "_runtime", object())
    output = [3, 5, 3]
    never = batch_of([request(9, [], **PENALIZED)])
    for token in output:
        decode(never, {9: token})
    reqs = [request(0, [], frequency_penalty=1.0), request(1, [])]
    reqs.insert(place, request(9, output, **PENALIZED))
    batch = batch_of(reqs)
    batch.prefix_lens, batch.extend_lens = [0] * 3, [2 + len(req.output_ids) for req in reqs]
    count_earlier_output(None, batch)
    found = biases(batch)
    assert torch.equal(found[9], biases(never)[9])
    assert torch.equal(found[0], torch.ones(VOCAB)) and torch.equal(found[1], torch.ones(VOCAB))
    decode(batch, {0: 1, 1: 1, 9: 4})


def test_only_the_last_chunk_of_a_restart_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attached, "_runtime", object())
    batch = batch_of([request(9, [3, 5, 3], **PENALIZED)])
    batch.prefix_lens, batch.extend_lens = [0], [2]
    before = batch.sampling_info.penalizer_orchestrator
    count_earlier_output(None, batch)
    assert batch.sampling_info.penalizer_orchestrator is before


def test_rows_that_sit_out_are_seen_by_aborts_timeouts_and_load_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, runtime = batch_of([request(slot, []) for slot in range(3)]), runtime_of([])
    sit_out(runtime, batch, {0, 2})
    monkeypatch.setattr(attached, "_runtime", runtime)
    seen = [req.slot for part in retraction.inflight_batches([batch, None], None) if part is not None for req in part.reqs]
    assert seen == [1, 0, 2]
    assert retraction.count_parked(SimpleNamespace(num_running_reqs=1), None).num_running_reqs == 3


@pytest.fixture
def sitting_out(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A runtime whose two requests sit out; `sent`: what clients are told."""
    from sglang.srt.managers import scheduler as stock
    from sglang.srt.mem_cache import common

    batch, sent = batch_of([request(slot, []) for slot in range(2)]), []
    scheduler = SimpleNamespace(
        _release_aborted_request=lambda req: None,
        send_abort_output=lambda abort, req: sent.append(abort),
        tree_cache=None,
        running_batch=SimpleNamespace(batch_is_full=True),
    )
    runtime = SimpleNamespace(queues=Queues(), scheduler=scheduler, participant=SimpleNamespace(victims=[]), sent=sent)
    sit_out(runtime, batch, {0, 1})
    monkeypatch.setattr(common, "release_kv_cache", lambda *args, **kwargs: None)
    monkeypatch.setattr(retraction, "release_unwritten", lambda runtime, req: None)
    monkeypatch.setattr(stock, "_make_abort_req", lambda req, finished_reason=None: (req.rid, finished_reason))
    return runtime


def test_an_abort_keeps_its_reason(sitting_out: SimpleNamespace) -> None:
    sitting_out.queues.parked[0].to_finish = FINISH_ABORT("Request running timeout reached.", 503)
    retraction.drop_aborted(sitting_out)
    told = [(rid, reason["message"], reason["status_code"]) for rid, reason in sitting_out.sent]
    assert told == [("r0", "Request running timeout reached.", 503)]
    assert [req.rid for req in sitting_out.queues.parked] == ["r1"]


def test_the_queue_is_looked_at_when_one_that_sits_out_ends(sitting_out: SimpleNamespace) -> None:
    """Its row is free; with --max-running-requests the next one would else wait until a running request has left."""
    retraction.end_parked(sitting_out)
    assert sitting_out.scheduler.running_batch.batch_is_full
    sitting_out.queues.parked[0].to_finish = FINISH_ABORT("aborted", 499)
    retraction.end_parked(sitting_out)
    assert not sitting_out.scheduler.running_batch.batch_is_full
