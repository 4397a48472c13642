"""What schedulers of other hosts report is there for everybody of the router's host, whether or not a request comes."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from sglang.srt.managers import load_snapshot
from sglang.srt.managers.load_snapshot import ShmLoadSnapshotReader, ZmqLoadSnapshotWriter, ZmqShmLoadSnapshotReader

from sglang_dcp.upstream.router import fresh_reports
from sglang_dcp.upstream.router.load_report import ReportedLoad, read_reports


def test_reports_are_taken_in_without_a_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_snapshot, "snapshot_decoder", load_snapshot.snapshot_decoder)
    monkeypatch.setattr(fresh_reports, "LOOK_SECONDS", 0.01)
    read_reports()
    endpoint, path, ended = f"ipc://{tmp_path}/loads", str(tmp_path / "shm"), threading.Event()
    fresh = fresh_reports.FreshReports(ZmqShmLoadSnapshotReader(endpoint, path, 2))
    thread = threading.Thread(target=fresh.keep_polling, args=(ended,))
    thread.start()
    writer, seen = ZmqLoadSnapshotWriter(endpoint, 2, 1), ShmLoadSnapshotReader(path, 2)
    try:
        for step in (7, 8):
            deadline = time.monotonic() + 20
            while not any(snapshot.dyncp_step == step for snapshot in seen.read_all()):
                writer.write(ReportedLoad(dp_rank=1, dyncp_step=step))
                assert time.monotonic() < deadline, "nobody took it in"
                time.sleep(0.01)
        assert fresh.read(1).dyncp_step == 8 and [snapshot.dyncp_step for snapshot in fresh.read_all()][-1:] == [8]
    finally:
        ended.set()
        thread.join()
        writer.close()


def test_one_host_keeps_sglang_s_reader(tmp_path: Path) -> None:
    reader = ShmLoadSnapshotReader(str(tmp_path / "shm"), 2)
    controller = SimpleNamespace(load_snapshot_reader=reader)
    fresh_reports.keep_reports_fresh(controller)
    assert controller.load_snapshot_reader is reader
