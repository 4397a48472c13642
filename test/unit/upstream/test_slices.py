"""Processes of an instance beside SGLang: its numbering of ranks, and the last words of a slice that has no load snapshot of its own."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.distributed import communication_op
from sglang.srt.managers import load_snapshot
from sglang.srt.managers.io_struct import FlushCacheReqInput
from sglang.srt.managers.load_snapshot import ShmLoadSnapshotReader, ShmLoadSnapshotWriter
from sglang.srt.managers.scheduler_components import flush_wrapper
from sglang.srt.managers.scheduler_components.flush_wrapper import SchedulerFlushWrapper
from sglang.srt.runtime_context import derive_attention_ranks

from sglang_dcp.dataflow.transport.base import TransportError
from sglang_dcp.ledger.participant import ProtocolError
from sglang_dcp.ledger.slices import Slices
from sglang_dcp.policy.split_limits import Layout
from sglang_dcp.upstream.ending import failure
from sglang_dcp.upstream.router.load_report import ReportedLoad, read_reports
from sglang_dcp.upstream.step import retention


@pytest.mark.parametrize(("instances", "per_instance"), [(2, 1), (2, 2), (4, 2), (2, 4), (3, 3)])
def test_ranks_are_numbered_as_sglang_numbers_them(instances: int, per_instance: int) -> None:
    slices = Slices(Layout(instances, instances), per_instance)
    for rank in range(slices.num_ranks):
        own_slice, instance = derive_attention_ranks(tp_rank=rank, attn_tp_size=per_instance, attn_cp_size=1)
        assert slices.place(rank) == (instance, own_slice)


class LastWords:
    """The two slices of instance 1, of two, on one snapshot file."""

    def __init__(self, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(load_snapshot, "snapshot_decoder", load_snapshot.snapshot_decoder)
        read_reports()
        self.path, self.writer, self.monkeypatch = path, ShmLoadSnapshotWriter(path, 2, 1), monkeypatch
        ShmLoadSnapshotWriter(path, 2, 0)
        monkeypatch.setattr(failure, "create_load_snapshot_writer", lambda ports, size, rank: ShmLoadSnapshotWriter(ports, size, rank))
        monkeypatch.setattr(failure, "create_load_snapshot_reader", lambda ports, caller: ShmLoadSnapshotReader(ports, 2))
        monkeypatch.setattr(failure, "current", lambda: SimpleNamespace(participant=SimpleNamespace(step=7)))
        monkeypatch.setattr(failure.time, "sleep", lambda seconds: None)

    def leave(self, slice_index: int, error: Exception) -> None:
        parallel = SimpleNamespace(attn_tp_size=2, num_dp_ranks=2, attn_dp_rank=1, attn_tp_rank=slice_index)
        self.monkeypatch.setattr(failure, "get_parallel", lambda: parallel)
        writer = None if slice_index else self.writer
        failure.leave_last_words(SimpleNamespace(load_snapshot_writer=writer, dyncp_ports=self.path), error)

    def found(self) -> list[str]:
        return failure.describe_failures(ShmLoadSnapshotReader(self.path, 2).read_all(), host_size=2)


@pytest.fixture
def last_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LastWords:
    return LastWords(str(tmp_path / "loads"), monkeypatch)


@pytest.mark.parametrize("cause", [0, 1])
@pytest.mark.parametrize("first", [0, 1])
def test_the_cause_stands_whichever_slice_raises_and_whoever_comes_first(last_words: LastWords, cause: int, first: int) -> None:
    for slice_index in (first, 1 - first):
        error = ProtocolError("went apart") if slice_index == cause else TransportError("peers did not answer")
        last_words.leave(slice_index, error)
    assert last_words.found() == [f"instance 1, slice {cause} raised in step 7: ProtocolError: went apart"]


def test_the_first_slice_does_not_write_its_load_over_anothers_last_words(last_words: LastWords, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is still on its way to the next meeting when the other raises."""
    monkeypatch.setattr(failure.time, "sleep", lambda seconds: last_words.writer.write(ReportedLoad(dp_rank=1)))
    last_words.leave(1, ProtocolError("went apart"))
    assert last_words.found() == ["instance 1, slice 1 raised in step 7: ProtocolError: went apart"]


@pytest.mark.parametrize("first", [0, 1])
def test_slices_that_all_lost_a_peer_say_so(last_words: LastWords, first: int) -> None:
    for slice_index in (first, 1 - first):
        last_words.leave(slice_index, TransportError("peers did not answer"))
    assert last_words.found() == [f"instance 1, slice {first} raised in step 7: TransportError: peers did not answer"]


def test_nobody_is_told_before_the_instance_is_attached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failure, "get_parallel", lambda: SimpleNamespace(attn_tp_size=2, num_dp_ranks=2, attn_dp_rank=1))
    failure.leave_last_words(SimpleNamespace(load_snapshot_writer=None), ValueError("no such file"))


@pytest.mark.parametrize("ahead", [-10.0, 10.0])
def test_slices_give_a_flush_up_in_the_same_round(monkeypatch: pytest.MonkeyPatch, ahead: float) -> None:
    """The clock of the second slice is ahead of the first one's, or behind it; both look at the flush in every round."""
    told: list[bool] = []
    answers: list[list[Any]] = [[], []]
    clock = SimpleNamespace(now=0.0)
    for module in (flush_wrapper, retention):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    runtimes = [SimpleNamespace(queues=SimpleNamespace(flushing=False)) for _ in range(2)]
    flushes = [
        SchedulerFlushWrapper(
            flush_cache=lambda: True, is_fully_idle=lambda: False, send_output=lambda out, _, slice_=slice_: answers[slice_].append(out)
        )
        for slice_ in range(2)
    ]
    for flush in flushes:
        assert flush.handle(FlushCacheReqInput(timeout_s=5.0)) is None
    for round_ in range(8):
        for slice_, (runtime, flush) in enumerate(zip(runtimes, flushes, strict=True)):
            clock.now = round_ + slice_ * ahead
            if slice_ == 0:
                monkeypatch.setattr(communication_op, "attn_cp_tp_broadcast_pyobj", lambda data: told.extend(data) or data)
            else:
                monkeypatch.setattr(communication_op, "attn_cp_tp_broadcast_pyobj", lambda data: told[-1:])
            retention.check_pending_flush.__wrapped__(runtime, SchedulerFlushWrapper.check_pending, flush)
        assert [len(given) for given in answers] == [int(round_ >= 5)] * 2
    assert [given[0].success for given in answers] == [False, False]
