"""What an instance reports to the router: each token of its requests once, in whatever state, on SGLang's own way."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.managers import load_snapshot
from sglang.srt.managers.load_snapshot import LoadSnapshot, ShmLoadSnapshotReader, ShmLoadSnapshotWriter, snapshot_encoder

from sglang_dcp.ledger.guests import GuestBook
from sglang_dcp.ledger.homes import HomeBook
from sglang_dcp.ledger.page_ids import Page, PageIds
from sglang_dcp.ledger.reservations import Grant, GrantedSegment
from sglang_dcp.policy.cluster_view import HomeReport
from sglang_dcp.policy.types import Placement
from sglang_dcp.upstream.router import load_report
from sglang_dcp.upstream.router.load_report import ReportedLoad, build_report, read_reports
from sglang_dcp.upstream.step import attached, retraction
from sglang_dcp.upstream.step.queues import Queues

PAGE = 16


def waiting(tokens: int, placement: Placement | None = None, dyncp: Any = None) -> SimpleNamespace:
    return SimpleNamespace(seqlen=tokens, dyncp_placement=placement, dyncp=dyncp)


def runtime_of(queue: list[Any], *, grammar: list[Any] | None = None, chunked: Any = None, rows: int = 0) -> SimpleNamespace:
    """Instance 1 of three."""
    scheduler = SimpleNamespace(
        waiting_queue=queue,
        grammar_manager=SimpleNamespace(grammar_queue=grammar or []),
        chunked_req=chunked,
        req_to_token_pool=SimpleNamespace(size=32, available_size=lambda: 32 - rows),
    )
    participant = SimpleNamespace(rank=1, step=3, page_size=PAGE, homes=HomeBook(PageIds(1, 3, 64, PAGE)), guests=GuestBook())
    participant.retention = SimpleNamespace(num_pages_here=0)
    return SimpleNamespace(scheduler=scheduler, participant=participant, queues=Queues(placements_taken_in=7))


def test_waiting_requests_count_where_their_placement_puts_them() -> None:
    split = Placement(1, (0, 2, 1), (320, 160, 40))
    runtime = runtime_of([waiting(64), waiting(30, Placement(1, (1,), (30,))), waiting(520, split)], grammar=[waiting(10)], rows=3)
    assert build_report(runtime, 100) == HomeReport(7, 7, {0: 320, 2: 160, 1: 100 + 64 + 30 + 40 + 10})


def test_the_rest_of_a_prompt_in_chunks_counts() -> None:
    chunked = SimpleNamespace(seqlen=500, dyncp=None, kv=SimpleNamespace(kv_allocated_len=256))
    assert build_report(runtime_of([], chunked=chunked, rows=1), 256) == HomeReport(7, 1, {1: 500})


def test_a_request_is_counted_once_before_and_after_its_grant() -> None:
    placement = Placement(1, (0, 1), (320, 160))
    runtime = runtime_of([])
    homes = runtime.participant.homes
    request = homes.open(0)
    runtime.scheduler.waiting_queue.append(waiting(480, placement, request))
    assert build_report(runtime, 0).tokens == {0: 320, 1: 160}
    # The own pool gives its pages in the step of the grant; those of the other instance have no number yet.
    homes.expect(request, Grant(1, request.handle, (GrantedSegment(0, 0, 20), GrantedSegment(1, 20, 11))))
    assert build_report(runtime, 11 * PAGE).tokens == {0: 320, 1: 176}
    homes.close(request.handle)
    runtime.scheduler.waiting_queue.clear()
    assert build_report(runtime, 0) == HomeReport(7, 0, {1: 0})


def test_guests_are_in_the_report_of_their_own_home() -> None:
    runtime = runtime_of([])
    runtime.participant.guests.lend(0, 5, 0, [3, 4, 5])
    assert build_report(runtime, 3 * PAGE + 200).tokens == {1: 200}


def test_pages_that_a_request_grew_by_count_where_they_lie() -> None:
    runtime = runtime_of([])
    homes = runtime.participant.homes
    request = homes.open(0)
    homes.adopt(request, [Page(1, 2), Page(1, 3)], 1)
    homes.append(request, Page(1, 4))
    homes.expect(request, Grant(1, request.handle, (GrantedSegment(2, 3, 1),)))
    assert dict(homes.granted_pages) == {1: 3, 2: 1} == request.granted_pages
    assert build_report(runtime, 3 * PAGE).tokens == {1: 3 * PAGE, 2: PAGE}


@pytest.fixture
def wide_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_snapshot, "snapshot_decoder", load_snapshot.snapshot_decoder)
    read_reports()


def test_the_report_travels_in_shared_memory(tmp_path: Path, wide_decoder: None) -> None:
    path = str(tmp_path / "loads")
    writer = ShmLoadSnapshotWriter(path, 2, 1)
    reader = ShmLoadSnapshotReader(path, 2)
    assert reader.read(1).dyncp is None
    report = HomeReport(70_000, 12, {0: 320, 1: 1 << 40})
    writer.write(ReportedLoad(dp_rank=1, num_used_tokens=9, dyncp=report))
    read = reader.read(1)
    assert read.dyncp == report and read.num_used_tokens == 9
    # SGLang's own answer to /v1/loads is as in stock.
    assert read.to_dict() == LoadSnapshot(dp_rank=1, num_used_tokens=9).to_dict()
    reader.close(), writer.close()


def test_a_reader_that_does_not_know_the_report_passes_over_it() -> None:
    words = snapshot_encoder.encode(ReportedLoad(dp_rank=1, dyncp=HomeReport(1, 2, {3: 4})))
    assert load_snapshot.msgspec.msgpack.decode(words, type=LoadSnapshot) == LoadSnapshot(dp_rank=1)


def test_only_an_attached_instance_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = LoadSnapshot(dp_rank=1, num_used_tokens=5 * PAGE, gen_throughput=3.5)
    monkeypatch.setattr(attached, "_runtime", None)
    assert load_report.add_report(snapshot, None) is snapshot
    monkeypatch.setattr(attached, "_runtime", runtime_of([waiting(64)]))
    reported = load_report.add_report(snapshot, None)
    assert reported.dyncp == HomeReport(7, 1, {1: 144}) and reported.gen_throughput == 3.5


def test_loads_are_told_as_in_stock_and_requests_that_sit_out_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The body of /v1/loads, through both of our hooks on it: stock's keys and values, and what sits out is counted once."""
    memory = load_snapshot.MemoryMetrics(weight_gb=1.0, kv_cache_gb=2.0, graph_gb=0.0, token_capacity=64 * PAGE)
    snapshot = LoadSnapshot(dp_rank=1, num_running_reqs=3, num_waiting_reqs=2, num_used_tokens=5 * PAGE, memory=memory)
    runtime = runtime_of([waiting(64)])
    monkeypatch.setattr(attached, "_runtime", runtime)
    for include in (None, {"core"}, {"memory"}):
        assert load_report.add_report(snapshot, None).to_dict(include) == snapshot.to_dict(include)
    runtime.queues.parked += [object(), object()]
    stock = snapshot.to_dict()
    told = load_report.add_report(retraction.count_parked(snapshot, None), None)
    assert told.to_dict() == stock | {"num_running_reqs": 5}
