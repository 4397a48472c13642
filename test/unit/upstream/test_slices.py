"""Processes of an instance beside SGLang: its numbering of ranks, and the last words of a slice that has no load snapshot of its own."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.managers import load_snapshot
from sglang.srt.managers.load_snapshot import ShmLoadSnapshotReader, ShmLoadSnapshotWriter
from sglang.srt.runtime_context import derive_attention_ranks

from sglang_dcp.dataflow.transport.base import TransportError
from sglang_dcp.ledger.participant import ProtocolError
from sglang_dcp.ledger.slices import Slices
from sglang_dcp.policy.split_limits import Layout
from sglang_dcp.upstream.ending import failure
from sglang_dcp.upstream.router.load_report import read_reports


@pytest.mark.parametrize(("instances", "per_instance"), [(2, 1), (2, 2), (4, 2), (2, 4), (3, 3)])
def test_ranks_are_numbered_as_sglang_numbers_them(instances: int, per_instance: int) -> None:
    slices = Slices(Layout(instances, instances), per_instance)
    for rank in range(slices.num_ranks):
        own_slice, instance = derive_attention_ranks(tp_rank=rank, attn_tp_size=per_instance, attn_cp_size=1)
        assert slices.place(rank) == (instance, own_slice)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_slice_without_a_snapshot_tells_the_cause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: tuple[int, int]) -> None:
    """Slice 1 of instance 1 raises, and slice 0 loses it, in either order: the cause stands."""
    monkeypatch.setattr(load_snapshot, "snapshot_decoder", load_snapshot.snapshot_decoder)
    read_reports()
    path = str(tmp_path / "loads")
    writers = [ShmLoadSnapshotWriter(path, 2, rank) for rank in range(2)]
    monkeypatch.setattr(failure, "get_parallel", lambda: SimpleNamespace(attn_tp_size=2, num_dp_ranks=2, attn_dp_rank=1))
    monkeypatch.setattr(failure, "create_load_snapshot_writer", lambda ports, size, rank: ShmLoadSnapshotWriter(ports, size, rank))
    monkeypatch.setattr(failure, "current", lambda: SimpleNamespace(participant=SimpleNamespace(step=7)))
    slices: list[tuple[Any, Exception]] = [
        (SimpleNamespace(load_snapshot_writer=writers[1]), TransportError("peers did not answer")),
        (SimpleNamespace(load_snapshot_writer=None, dyncp_ports=path), ProtocolError("went apart")),
    ]
    for index in order:
        failure.leave_last_words(*slices[index])
    found = failure.describe_failures(ShmLoadSnapshotReader(path, 2).read_all(), host_size=2)
    assert found == ["instance 1 raised in step 7: ProtocolError: went apart"]


def test_nobody_is_told_before_the_instance_is_attached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failure, "get_parallel", lambda: SimpleNamespace(attn_tp_size=2, num_dp_ranks=2, attn_dp_rank=1))
    failure.leave_last_words(SimpleNamespace(load_snapshot_writer=None), ValueError("no such file"))
