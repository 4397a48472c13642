"""A step in which a peer did not answer: its tokens reach nobody, those of the step before do."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from http import HTTPStatus
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_dcp.dataflow.graph.silence import IN_FLIGHT, SilenceLog, SilenceNote
from sglang_dcp.dataflow.step_mode import STOCK, Graph, GraphStep
from sglang_dcp.dataflow.transport.base import TransportError
from sglang_dcp.policy.split_limits import Layout, SplitLimits
from sglang_dcp.upstream.layers import silence
from sglang_dcp.upstream.step.attached import attach, current
from sglang_dcp.upstream.step.driver import StepDriver
from sglang_dcp.upstream.step.handlers import after_forward
from sglang_dcp.upstream.step.runtime import Runtime

LIMITS = SplitLimits(8, 2, 8, Layout(2, 2))


class Attention:
    """Graph attention as `silence` sees it. `mask` is what the exchange's kernels keep."""

    def __init__(self) -> None:
        self.mask = torch.zeros(1, dtype=torch.int32)
        self.log = SilenceLog(self.mask)
        self.note_silence = self.log.note

    def raise_if_silent(self, note: SilenceNote) -> None:
        if note.silent():
            raise TransportError(f"step {note.step}: {note.silent()}")


@dataclass
class Result:
    """SGLang's of a step."""

    tokens: list[int]
    can_run_cuda_graph: bool = True
    copy_done: Any = field(default_factory=lambda: SimpleNamespace(synchronize=lambda: None))


@dataclass
class Request:
    rid: str
    output_ids: list[int] = field(default_factory=list)
    is_finished: bool = False

    def finished(self) -> bool:
        return self.is_finished


class Scheduler:
    """SGLang's loops, cut down to when a result is processed: at once, or with overlap when the next step has been launched."""

    def __init__(self, bound: Any, attention: Attention, *, overlap: bool) -> None:
        self.bound, self.attention, self.overlap = bound, attention, overlap
        self.reqs = [Request("a"), Request("b")]
        self.queue: deque[tuple[Any, Result]] = deque()
        self.errors: list[Any] = []
        self.step = 0

    def run(self, *, silent: int = 0, graph: bool = True) -> None:
        """One step; `silent` are the peers that go silent within its layers."""
        self.step += 1
        self.bound.mode = Graph(16, GraphStep(self.step, [], [])) if graph else STOCK
        self.attention.mask |= silent
        result = Result([self.step] * len(self.reqs), can_run_cuda_graph=graph)
        after_forward(result, None)
        self.queue.append((SimpleNamespace(reqs=list(self.reqs)), result))
        if len(self.queue) > self.overlap:
            self.process_batch_result(*self.queue.popleft())

    def process_batch_result(self, batch: Any, result: Result) -> None:
        silence.end_if_silent(self, batch, result)
        for req, token in zip(batch.reqs, result.tokens, strict=True):
            req.output_ids.append(token)

    def send_abort_output(self, abort_req: Any, req: Request) -> None:
        self.errors.append((abort_req, req))


@pytest.fixture
def attention(monkeypatch: pytest.MonkeyPatch) -> Iterator[Attention]:
    built = Attention()
    found = Runtime(
        None, None, SimpleNamespace(ids=None, group=range(2), limits=LIMITS), None, None, None, SimpleNamespace(attention=built)
    )  # type: ignore[arg-type]
    StepDriver(found)
    attach(found)
    monkeypatch.setattr(silence, "ANSWER_SECONDS", 0.0)
    yield built
    attach(None)


@pytest.mark.parametrize("overlap", [False, True])
def test_tokens_of_a_step_without_an_answer_reach_nobody(attention: Attention, overlap: bool) -> None:
    scheduler = Scheduler(current(), attention, overlap=overlap)
    scheduler.run()
    scheduler.run()
    with pytest.raises(TransportError, match=r"step 3: \[1, 3\]"):
        scheduler.run(silent=0b1010)
        scheduler.run()
    assert [req.output_ids for req in scheduler.reqs] == [[1, 2], [1, 2]], "the step before is whole: it is handed out, no other is"
    assert [abort_req.rid for abort_req, _ in scheduler.errors] == ["a", "b"]
    for abort_req, _ in scheduler.errors:
        assert abort_req.finished_reason["status_code"] == HTTPStatus.SERVICE_UNAVAILABLE
        assert "did not answer in step 3" in abort_req.finished_reason["message"]


def test_a_request_that_has_ended_gets_no_second_end(attention: Attention) -> None:
    """With overlap a request's last token may be found when its next step runs already."""
    scheduler = Scheduler(current(), attention, overlap=True)
    scheduler.run()
    scheduler.reqs[0].is_finished = True
    with pytest.raises(TransportError, match="step 2"):
        scheduler.run(silent=1)
        scheduler.run()
    assert [abort_req.rid for abort_req, _ in scheduler.errors] == ["b"]


def test_an_instance_without_requests_ends_too(attention: Attention) -> None:
    scheduler = Scheduler(current(), attention, overlap=True)
    scheduler.reqs = []
    with pytest.raises(TransportError, match="step 1"):
        scheduler.run(silent=1)
        scheduler.run()
    assert scheduler.errors == []


def test_steps_without_sharded_rows_are_not_asked(attention: Attention) -> None:
    scheduler = Scheduler(current(), attention, overlap=True)
    for _ in range(3):
        scheduler.run(silent=1, graph=False)
    assert scheduler.reqs[0].output_ids == [1, 2] and not hasattr(scheduler.queue[0][1], "dyncp_silence")


def test_the_result_is_waited_for_before_the_note_is_read(attention: Attention) -> None:
    """The copy has ended when SGLang's own, queued behind it, has."""
    scheduler = Scheduler(current(), attention, overlap=True)
    scheduler.run()
    _, result = scheduler.queue[0]
    result.copy_done = SimpleNamespace(synchronize=lambda: result.dyncp_silence.word.fill(2))  # type: ignore[attr-defined]
    with pytest.raises(TransportError, match=r"step 1: \[1\]"):
        scheduler.run()


def test_every_step_in_flight_has_its_own_note() -> None:
    mask = torch.zeros(1, dtype=torch.int32)
    log = SilenceLog(mask)
    notes = [log.note(0)]
    for step in range(1, IN_FLIGHT):
        mask.fill_(1 << step)
        notes.append(log.note(step))
    assert [note.silent() for note in notes] == [[], [1], [2], [3]]
    mask.fill_(0x8001)
    assert log.note(IN_FLIGHT).silent() == [0, 15]
