"""The end of a server, without one: every open request is answered before anything is killed, the cause is named, files go, code 75."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from http import HTTPStatus
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from sglang.srt.environ import envs
from sglang.srt.managers import load_snapshot
from sglang.srt.managers.load_snapshot import ShmLoadSnapshotReader, ShmLoadSnapshotWriter
from sglang.srt.managers.tokenizer_manager import ServerStatus
from uvicorn.supervisors import Multiprocess

from sglang_dcp.config import ConfigError, DynCpConfig
from sglang_dcp.dataflow.transport.base import TransportError
from sglang_dcp.upstream.ending import failure, handler, temporary_folders, workers
from sglang_dcp.upstream.ending.dumps import writes_core_dumps
from sglang_dcp.upstream.ending.family import Family, Member, role_of_title
from sglang_dcp.upstream.ending.gate import Gate, GateMiddleware
from sglang_dcp.upstream.ending.progress import ProgressWatch, StepReport, describe_steps
from sglang_dcp.upstream.ending.shared_files import SharedFiles
from sglang_dcp.upstream.router.load_report import ReportedLoad, read_reports

# --- the gate


async def ask(gate: Gate, method: str = "POST", path: str = "/generate", app: Any = None) -> list[dict[str, Any]]:
    sent: list[dict[str, Any]] = []

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"ok"})

    async def send(message: Any) -> None:
        sent.append(dict(message))

    await GateMiddleware(app or answer, gate)({"type": "http", "method": method, "path": path}, None, send)  # type: ignore[arg-type]
    return sent


def statuses(gate: Gate) -> dict[str, int]:
    requests = [("POST", "/generate"), ("POST", "/v1/chat/completions"), ("POST", "/abort_request"), ("GET", "/metrics")]
    return {path: asyncio.run(ask(gate, method, path))[0]["status"] for method, path in requests}


def test_a_draining_server_refuses_work_and_an_ending_one_everything() -> None:
    gate = Gate()
    assert set(statuses(gate).values()) == {200}
    gate.draining = "shutting down"
    assert statuses(gate) == {"/generate": 503, "/v1/chat/completions": 503, "/abort_request": 200, "/metrics": 200}
    gate.ending = "lost instance 1"
    assert set(statuses(gate).values()) == {503}
    body = asyncio.run(ask(gate))[1]["body"]
    assert json.loads(body)["error"] == {"message": "lost instance 1", "type": "service_unavailable", "code": 503}


def test_an_answer_is_open_until_its_last_byte_whatever_runs_behind_it() -> None:
    gate, seen = Gate(), []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(gate.open_answers)
        await send({"type": "http.response.body", "body": b"a", "more_body": True})
        seen.append(gate.open_answers)
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        seen.append(gate.open_answers)  # a background task of SGLang's

    asyncio.run(ask(gate, app=app))
    assert (seen, gate.open_answers) == ([1, 1, 0], 0)


def test_an_answer_that_fails_or_is_no_work_does_not_stay_open() -> None:
    gate = Gate()

    async def broken(scope: Any, receive: Any, send: Any) -> None:
        assert gate.open_answers == (scope["method"] == "POST")
        raise OSError("client has gone")

    for method in ("POST", "GET"):
        with pytest.raises(OSError):
            asyncio.run(ask(gate, method, app=broken))
    assert gate.open_answers == 0


# --- progress


def reports(*stamps: float, warm: bool = True) -> list[StepReport]:
    return [StepReport(rank, stamp, int(stamp), warm) for rank, stamp in enumerate(stamps)]


def test_it_hangs_when_requests_are_open_and_nothing_moves() -> None:
    watch = ProgressWatch(10.0, 2)
    seen = [watch.is_hung(now, reports(1.0, 1.0), has_work=True) for now in (0.0, 5.0, 9.9, 10.0)]
    assert seen == [False, False, False, True]


def test_one_instance_that_moves_is_enough() -> None:
    watch = ProgressWatch(10.0, 2)
    assert not any(watch.is_hung(5.0 * i, reports(1.0, float(i)), has_work=True) for i in range(10))


def test_it_is_not_armed_before_every_instance_has_compiled_its_kernels() -> None:
    watch = ProgressWatch(10.0, 2)
    cold = [*reports(1.0), StepReport(1, 1.0, 1, False)]
    assert not any(watch.is_hung(100.0 * i, cold, has_work=True) for i in range(5))
    assert not watch.is_hung(500.0, reports(1.0), has_work=True), "a report that is missing is no warm instance"
    assert not watch.is_hung(600.0, reports(1.0, 1.0), has_work=True)
    assert watch.is_hung(610.0, cold, has_work=True), "once armed it stays so"


def test_time_without_work_does_not_count() -> None:
    watch = ProgressWatch(10.0, 1)
    for now, work, hung in ((0.0, True, False), (8.0, False, False), (100.0, True, False), (109.0, True, False), (111.0, True, True)):
        assert watch.is_hung(now, reports(1.0), has_work=work) is hung, now


def test_steps_are_named() -> None:
    assert describe_steps(reports(51.0, 50.0)) == "instance 0 at step 51, instance 1 at step 50"


# --- shared-memory files


def test_only_files_of_known_kinds_that_are_mapped_by_a_process_of_ours_go(tmp_path: Path) -> None:
    folder, processes = tmp_path / "shm", tmp_path / "proc"
    kept = ("model.safetensors", "sgl_shm_mq_other", "sem.mp-other", "nccl-x")
    ours = ("sgl_shm_mq_7_ab", "sglang_loads_x.shm", "sem.mp-abc")
    folder.mkdir()
    for name in (*kept, *ours):
        (folder / name).touch()
    (folder / "deep").mkdir()
    (folder / "deep" / "sem.mp-deep").touch()
    mapped = [*ours, "model.safetensors", "deep/sem.mp-deep", "psm_gone (deleted)"]
    (processes / "7").mkdir(parents=True)
    (processes / "7" / "maps").write_text("".join(f"7f00-7f10 rw-s 00000000 00:1a 5   {folder}/{name}\n" for name in mapped))
    files = SharedFiles(folder, processes)
    files.note([7, 8])
    assert files.unlink() == sorted(ours)
    assert files.unlink() == []
    assert {path.name for path in folder.iterdir()} == {*kept, "deep"}
    assert (folder / "deep" / "sem.mp-deep").exists()


# --- temporary folders


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """This process's temporary folder, and none of the libraries that make one in it."""
    monkeypatch.setattr(temporary_folders, "_shared", [])
    monkeypatch.setattr(temporary_folders.tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv("CUDA_TILE_TEMP_DIR", raising=False)
    monkeypatch.setitem(sys.modules, "cuda.tile._cext", None)
    monkeypatch.setitem(sys.modules, "sglang.srt.utils.common", None)
    return tmp_path


def test_processes_share_one_folder_that_goes_with_the_server(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (temporary / "of somebody else").mkdir()
    for name in ("tile", "metrics"):
        (temporary / name / "deep").mkdir(parents=True)
    tile = SimpleNamespace(default_tile_context=SimpleNamespace(config=SimpleNamespace(temp_dir=str(temporary / "tile"))))
    monkeypatch.setitem(sys.modules, "cuda.tile._cext", tile)
    made = SimpleNamespace(prometheus_multiproc_dir=SimpleNamespace(name=str(temporary / "metrics")))
    monkeypatch.setitem(sys.modules, "sglang.srt.utils.common", made)
    monkeypatch.setenv("CUDA_TILE_TEMP_DIR", "")  # so that monkeypatch takes it away again
    monkeypatch.delenv("CUDA_TILE_TEMP_DIR")
    temporary_folders.share_folder()
    temporary_folders.share_folder()
    shared = Path(os.environ["CUDA_TILE_TEMP_DIR"])
    (shared / "x.bytecode").touch()
    assert shared.parent == temporary and len(list(temporary.iterdir())) == 4
    temporary_folders.remove_folders()
    temporary_folders.remove_folders()
    assert [path.name for path in temporary.iterdir()] == ["of somebody else"]


def test_a_folder_that_the_user_names_stays(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (temporary / "mine").mkdir()
    monkeypatch.setenv("CUDA_TILE_TEMP_DIR", str(temporary / "mine"))
    tile = SimpleNamespace(default_tile_context=SimpleNamespace(config=SimpleNamespace(temp_dir=str(temporary / "mine"))))
    monkeypatch.setitem(sys.modules, "cuda.tile._cext", tile)
    temporary_folders.share_folder()
    temporary_folders.remove_folders()
    assert [path.name for path in temporary.iterdir()] == ["mine"]


# --- who was it


def test_a_death_by_signal_is_named_and_a_normal_end_is_not() -> None:
    roles = {11: "instance 1", 10: "instance 0", 12: "detokenizer", 13: "x"}
    members = {pid: Member(psutil.Process(), role) for pid, role in roles.items()}
    codes = {10: None, 11: -signal.SIGKILL, 12: 3, 13: 0}
    dead = Family(members).describe_dead(codes)
    assert dead == ["detokenizer (pid 12) ended with exit code 3", "instance 1 (pid 11) was killed by SIGKILL"]


@pytest.mark.parametrize(("num_slices", "role"), [(1, "instance 1"), (2, "instance 1, slice 1")])
def test_a_slice_is_named_where_an_instance_has_several(num_slices: int, role: str) -> None:
    rank = num_slices + num_slices - 1
    assert role_of_title(f"sglang::scheduler_DP1_TP{rank}_EP{rank}", num_slices) == role
    assert role_of_title("sglang::data_parallel_controller", num_slices) == "data parallel controller"
    assert role_of_title("python -c pass", num_slices) is None


def test_a_stopped_process_is_named() -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        family = Family({process.pid: Member(psutil.Process(process.pid), "instance 1")})
        assert family.describe_stopped() == []
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
        assert family.describe_stopped() == [f"instance 1 (pid {process.pid}) is stopped by a signal"]
    finally:
        process.kill()
        process.wait()
    assert family.describe_stopped() == []


def test_the_first_exception_reaches_the_main_process_with_rank_and_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_snapshot, "snapshot_decoder", load_snapshot.snapshot_decoder)
    read_reports()
    path = str(tmp_path / "loads")
    times = iter((20.0, 10.0))
    monkeypatch.setattr(failure, "get_parallel", lambda: SimpleNamespace(attn_tp_size=1))
    monkeypatch.setattr(failure.time, "time", lambda: next(times))
    for rank, error in ((0, TransportError("peers did not answer")), (1, ValueError("x" * 2000))):
        monkeypatch.setattr(failure, "current", lambda rank=rank: SimpleNamespace(participant=SimpleNamespace(step=5 + rank)))
        scheduler = SimpleNamespace(load_snapshot_writer=ShmLoadSnapshotWriter(path, 3, rank))

        def loop(_scheduler: Any, error: Exception = error) -> None:
            raise error

        with pytest.raises(type(error)):
            failure.run_event_loop(loop, scheduler)
    ShmLoadSnapshotWriter(path, 3, 2)
    found = failure.describe_failures(ShmLoadSnapshotReader(path, 3).read_all(), host_size=3)
    assert found == ["instance 1 raised in step 6: ValueError: " + "x" * (failure.MOST_CHARACTERS - len("ValueError: "))]


def told(rank: int, step: int, stamp: float, *, lost: bool = False) -> ReportedLoad:
    return ReportedLoad(timestamp=stamp, dp_rank=rank, dyncp_step=step, dyncp_failure=f"error of {rank}", dyncp_lost_peer=lost)


@pytest.mark.parametrize("ahead", [-5.0, 0.0, 5.0])
def test_the_first_failure_is_told_whatever_the_hosts_clocks_say(ahead: float) -> None:
    """Two hosts of two instances; the clock of the second is `ahead` seconds off."""
    peers = [told(0, 12, 100.3, lost=True), told(1, 12, 100.2, lost=True), told(2, 12, 100.4 + ahead, lost=True)]
    assert failure.describe_failures([*peers, told(3, 12, 100.1 + ahead)], 2) == ["instance 3 raised in step 12: error of 3"]
    early = [told(0, 13, 100.0), told(1, 13, 100.1), told(3, 12, 100.0 + ahead)]
    assert failure.describe_failures(early, 2) == ["instance 3 raised in step 12: error of 3"]
    assert failure.describe_failures([told(2, 9, 7.1), told(3, 9, 7.0), ReportedLoad(dp_rank=0)], 2) == [
        "instance 3 raised in step 9: error of 3"
    ]
    assert failure.describe_failures([ReportedLoad(dp_rank=0)], 2) == []


def test_who_lost_a_peer_says_so() -> None:
    gloo = RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:31337")
    wrapped = ValueError("the step failed")
    wrapped.__cause__ = gloo
    assert all(map(failure.lost_a_peer, (gloo, wrapped, TransportError("rank 0, step 7"))))
    assert not failure.lost_a_peer(ValueError("no such page")) and not failure.lost_a_peer(None)


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ({}, False),
        ({"CUDA_ENABLE_USER_TRIGGERED_COREDUMP": "1"}, True),
        ({"CUDA_ENABLE_USER_TRIGGERED_COREDUMP": "1", "SGLANG_CUDA_COREDUMP_BEFORE_CRASH": "0"}, False),
        ({"SGLANG_CUDA_COREDUMP_BEFORE_CRASH": "1"}, False),
    ],
)
def test_core_dumps_are_waited_for_where_there_are_some(environment: dict[str, str], wanted: bool) -> None:
    assert writes_core_dumps(environment) is wanted


# --- the handler


class FakeManager:
    """The parts of TokenizerManager that the handler touches. `events` is what happened, in order."""

    def __init__(self, states: dict[str, bool]) -> None:
        self.events: list[Any] = []
        self.event_loop = asyncio.get_running_loop()
        self.rid_to_state = {rid: SimpleNamespace(dispatched=dispatched) for rid, dispatched in states.items()}
        self.is_pause = False
        self.is_pause_cond = asyncio.Condition()
        self.server_status = ServerStatus.Up
        self.gracefully_exit = False
        self.dyncp_limits = SimpleNamespace(num_instances=2)
        self.load_snapshot_reader = SimpleNamespace(read_all=list)
        self._subprocess_watchdog = SimpleNamespace(_processes=[], stop=lambda: self.events.append("watchdog stopped"))

    def _handle_abort_req(self, message: Any) -> None:
        del self.rid_to_state[message.rid]
        assert message.finished_reason["status_code"] is HTTPStatus.SERVICE_UNAVAILABLE
        assert message.finished_reason["type"] == "abort"
        self.events.append((message.rid, message.finished_reason["message"]))

    def dump_requests_before_crash(self) -> None:
        self.events.append("dump")


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    gate = Gate()
    monkeypatch.setattr(handler, "GATE", gate)
    monkeypatch.setattr(handler.util, "Finalize", lambda *args, **kwargs: None)
    return gate


def make(monkeypatch: pytest.MonkeyPatch, manager: FakeManager, **settings: Any) -> handler.EndingHandler:
    config = DynCpConfig(**({"hang_seconds": 0.0} | settings))
    monkeypatch.setattr(handler.DynCpConfig, "from_environment", classmethod(lambda cls: config))
    monkeypatch.setattr(handler, "get_parallel", lambda: SimpleNamespace(attn_tp_size=1))
    monkeypatch.setattr(Family, "kill", lambda self: manager.events.append("kill"))
    monkeypatch.setattr(SharedFiles, "unlink", lambda self: manager.events.append("files"))
    monkeypatch.setattr(handler.os, "_exit", lambda code: manager.events.append(("exit", code)))
    return handler.EndingHandler(manager)


def test_every_request_is_answered_before_anything_is_killed(monkeypatch: pytest.MonkeyPatch, gate: Gate) -> None:
    async def run() -> list[Any]:
        manager = FakeManager({"a": True, "b": True, "in tokenization": False})
        manager.is_pause = True
        gate.open_answers = 3
        ending = make(monkeypatch, manager)
        ending.running_phase_sigquit_handler(signal.SIGQUIT)
        ending.running_phase_sigquit_handler(signal.SIGQUIT)  # every peer of a dead instance sends one
        assert gate.ending is not None
        await asyncio.sleep(5 * handler.SWEEP_SECONDS)
        assert not manager.is_pause
        assert [event[0] for event in manager.events if event != "watchdog stopped"] == ["a", "b"]
        manager.rid_to_state["in tokenization"].dispatched = True
        await asyncio.sleep(5 * handler.SWEEP_SECONDS)
        assert manager.events[-1][0] == "in tokenization"
        gate.open_answers = 0
        while ("exit", 75) not in manager.events:
            await asyncio.sleep(0.01)
        return manager.events

    events = asyncio.run(run())
    assert events[-4:] == ["dump", "kill", "files", ("exit", 75)]
    assert events.count(("exit", 75)) == 1


def test_a_request_that_sglang_cannot_close_is_answered_and_keeps_no_other_open(monkeypatch: pytest.MonkeyPatch, gate: Gate) -> None:
    async def run() -> None:
        manager = FakeManager({"odd": True, "b": True})
        odd = manager.rid_to_state["odd"]
        odd.event, close = asyncio.Event(), manager._handle_abort_req

        def refuse_one(message: Any) -> None:
            if message.rid == "odd":
                raise KeyError("output_token_logprobs")
            close(message)

        manager._handle_abort_req = refuse_one  # type: ignore[method-assign]
        make(monkeypatch, manager).end("lost")
        async with asyncio.timeout(20):
            await odd.event.wait()
            while ("exit", 75) not in manager.events:
                await asyncio.sleep(0.01)
        assert odd.finished and odd.out_list[-1]["meta_info"]["finish_reason"]["status_code"] == 503
        assert manager.events[0] == "watchdog stopped" and manager.events[1][0] == "b"

    asyncio.run(run())


def test_the_handler_is_taken_where_the_instances_were_started_only() -> None:
    for watchdog, wanted in ((object(), handler.EndingHandler), (None, handler.WorkerHandler)):
        manager = SimpleNamespace(_subprocess_watchdog=watchdog, signal_handler_class="stock")
        handler.take_signals(manager)
        assert manager.signal_handler_class is wanted


def test_a_worker_answers_its_clients_and_kills_nobody(gate: Gate) -> None:
    async def run() -> list[Any]:
        manager = FakeManager({"a": True, "b": True})
        worker = handler.WorkerHandler(manager)
        for _ in range(2):
            worker.running_phase_sigquit_handler(signal.SIGQUIT)
        async with asyncio.timeout(20):
            while manager.rid_to_state:
                await asyncio.sleep(0.01)
        return manager.events

    message = "the server is ending, ask again later: a process of it failed, its log says which"
    assert asyncio.run(run()) == [("a", message), ("b", message)]
    assert gate.ending == message


def test_the_supervisor_of_several_workers_ends_at_sigquit(monkeypatch: pytest.MonkeyPatch) -> None:
    """uvicorn's own: it takes all signals, and drops those that it has no method for."""
    events: list[Any] = []
    monkeypatch.setattr(Multiprocess, "handle_quit", None, raising=False)
    monkeypatch.setattr(workers, "WORKER_SECONDS", 0.0)
    monkeypatch.setattr(workers.os, "kill", lambda pid, number: events.append((pid, number)))
    monkeypatch.setattr(workers.os, "_exit", lambda code: events.append(("exit", code)))
    monkeypatch.setattr(Family, "kill", lambda self: events.append("kill"))
    monkeypatch.setattr(SharedFiles, "unlink", lambda self: events.append("files"))
    watchdog = SimpleNamespace(_processes=[], stop=lambda: events.append("watchdog stopped"))
    workers.end_on_sigquit(watchdog)
    supervisor = Multiprocess.__new__(Multiprocess)
    supervisor.signal_queue = [signal.SIGQUIT]
    supervisor.processes = [SimpleNamespace(pid=pid) for pid in (11, 12)]  # type: ignore[misc]
    supervisor.handle_signals()
    assert events == ["watchdog stopped", (11, signal.SIGQUIT), (12, signal.SIGQUIT), "kill", "files", ("exit", 75)]


def test_an_exception_of_the_main_process_ends_the_server_with_answers(monkeypatch: pytest.MonkeyPatch, gate: Gate) -> None:
    async def loop(_manager: Any) -> None:
        raise ValueError("Incorrect label names")

    async def run() -> list[Any]:
        manager = FakeManager({"a": True})
        with pytest.raises(ValueError, match="Incorrect label names"):
            await handler.end_on_failure(loop, manager)
        make(monkeypatch, manager)
        await handler.end_on_failure(loop, manager)
        async with asyncio.timeout(20):
            while ("exit", 75) not in manager.events:
                await asyncio.sleep(0.01)
        return manager.events

    events = asyncio.run(run())
    assert events[:2] == [
        "watchdog stopped",
        ("a", "the server is ending, ask again later: the main process raised ValueError: Incorrect label names"),
    ]


def test_a_client_that_does_not_read_holds_the_end_up_for_a_bounded_time(monkeypatch: pytest.MonkeyPatch, gate: Gate) -> None:
    async def run() -> None:
        manager = FakeManager({})
        gate.open_answers = 1
        monkeypatch.setattr(handler, "ANSWER_SECONDS", 0.1)
        make(monkeypatch, manager).end("no step for 60 s")
        async with asyncio.timeout(20):
            while ("exit", 75) not in manager.events:
                await asyncio.sleep(0.01)

    asyncio.run(run())


def test_the_exit_code_is_the_same_when_the_end_itself_fails(monkeypatch: pytest.MonkeyPatch, gate: Gate) -> None:
    async def run() -> list[Any]:
        manager = FakeManager({})
        manager.dump_requests_before_crash = lambda: 1 / 0  # type: ignore[method-assign, assignment]
        make(monkeypatch, manager).end("lost")
        async with asyncio.timeout(20):
            while not manager.events or manager.events[-1] != ("exit", 75):
                await asyncio.sleep(0.01)
        return manager.events

    assert "kill" in asyncio.run(run())


def test_sigterm_drains_and_answers_after_its_limit_what_is_still_open(monkeypatch: pytest.MonkeyPatch, gate: Gate) -> None:
    async def run() -> list[Any]:
        manager = FakeManager({"long": True})
        make(monkeypatch, manager, drain_seconds=0.1).sigterm_handler(signal.SIGTERM)
        assert manager.gracefully_exit and gate.draining and not manager.events
        async with asyncio.timeout(20):
            while manager.rid_to_state:
                await asyncio.sleep(0.01)
        return manager.events

    assert asyncio.run(run()) == [("long", "the server is shutting down: the answer was not complete after --dyncp-drain-seconds 0.1")]


def test_sigterm_after_a_failed_probe_answers_first(monkeypatch: pytest.MonkeyPatch, gate: Gate) -> None:
    async def run() -> None:
        manager = FakeManager({"open": True})
        manager.server_status = ServerStatus.UnHealthy
        gate.open_answers = 1
        ending = make(monkeypatch, manager)
        ending.sigterm_handler(signal.SIGTERM)
        await asyncio.sleep(5 * handler.SWEEP_SECONDS)
        assert not manager.rid_to_state and not manager.gracefully_exit, "SGLang's shutdown blocks the loop: answers must be out"
        gate.open_answers = 0
        async with asyncio.timeout(20):
            while not manager.gracefully_exit:
                await asyncio.sleep(0.01)

    asyncio.run(run())


@pytest.mark.parametrize("core_dumps", [False, True])
def test_no_end_waits_for_dumps_that_nobody_writes(monkeypatch: pytest.MonkeyPatch, gate: Gate, core_dumps: bool) -> None:
    """SGLang's own shutdown, after a failed probe, calls the same method of the manager: it would sleep for 65 s."""
    monkeypatch.setenv("CUDA_ENABLE_USER_TRIGGERED_COREDUMP", "1" if core_dumps else "0")
    for setting in (envs.SGLANG_PYSPY_DUMP_BEFORE_CRASH, envs.SGLANG_CUDA_COREDUMP_BEFORE_CRASH):
        monkeypatch.delenv(setting.name, raising=False)  # SGLang's `override` puts nothing back where its body raised
    seen = []

    async def run() -> None:
        manager = FakeManager({})
        manager.dump_requests_before_crash = lambda: seen.append(  # type: ignore[method-assign]
            (envs.SGLANG_PYSPY_DUMP_BEFORE_CRASH.get(), envs.SGLANG_CUDA_COREDUMP_BEFORE_CRASH.get())
        )
        make(monkeypatch, manager)
        manager.dump_requests_before_crash()

    asyncio.run(run())
    assert seen == [(False, core_dumps)]


@pytest.mark.parametrize("flag", ["hang_seconds", "drain_seconds"])
@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_seconds_that_make_no_sense_are_refused(flag: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"--dyncp-{flag.replace('_', '-')} must be .* got {value}"):
        DynCpConfig(**{flag: value})
