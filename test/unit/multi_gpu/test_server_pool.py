"""Servers that parts share: started once, failures stay with their name, stacks of those that hung, one at a time in the dry form."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmark.multi_gpu import open_arrivals, part_step_time, server_pool
from benchmark.multi_gpu.open_arrivals import PLACEMENTS, OutOfTime, client_environment, placed_degrees, search_rate, try_rate
from benchmark.multi_gpu.report import Report
from benchmark.multi_gpu.server_pool import DYNCP, LONG_POOL, SERVED_POOL, STOCK, SYNTHETIC, ServerPool, build_server, cost_model_notes
from benchmark.multi_gpu.servers import GRAPH_SIZES, WITHOUT_PREFILL, ServerRefused
from benchmark.multi_gpu.settings import Settings, Skipped
from benchmark.multi_gpu.streams import Streamed
from sglang_dcp.observe.placement_log import LOG_VARIABLE, PlacementLog
from sglang_dcp.policy.types import InstanceLoad, Placement, PlacementRequest


def settings(tmp_path: Path, **changes: Any) -> Settings:
    given: dict[str, Any] = {"num_gpus": 2, "out": tmp_path / "report.json", "work": tmp_path, "facts": {"names": ["NVIDIA H100"] * 2}}
    return Settings(**(given | changes))


class FakeServer:
    def __init__(self, name: str, history: list[str], *, dies: bool = False) -> None:
        self.name, self.history, self.dies, self.dyncp = name, history, dies, name != STOCK
        self.ready_s: float | None = None
        self.alive = False

    def start(self, _folder: Path, port: int) -> None:
        self.history.append(f"start {self.name} {port}")
        self.alive = not self.dies

    def log(self) -> str:
        return "sglang_dcp: no such thing"

    def dump_stacks(self) -> None:
        self.history.append(f"stacks {self.name}")


@pytest.fixture
def history(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    events: list[str] = []

    def wait_ready(servers: list[Any], _deadline: float) -> None:
        for server in servers:
            server.ready_s = 1.0 if server.alive else None

    monkeypatch.setattr(server_pool, "build_server", lambda name, _settings: FakeServer(name, events, dies=name == "b_dead"))
    monkeypatch.setattr(server_pool, "find_free_port", lambda first, _last: first)
    monkeypatch.setattr(server_pool, "wait_ready", wait_ready)
    monkeypatch.setattr(server_pool, "stop_all", lambda servers: events.extend(f"stop {server.name}" for server in servers))
    monkeypatch.setattr(server_pool, "warm_up", lambda server, _settings: events.append(f"warm {server.name}"))
    return events


def test_a_server_is_started_and_warmed_once_for_all_parts(tmp_path: Path, history: list[str]) -> None:
    pool = ServerPool(settings(tmp_path))
    pool.start(STOCK, SYNTHETIC)
    for _ in range(2):
        with pool.using(STOCK) as server:
            assert server.name == STOCK
    pool.close()
    assert history == [
        f"start {STOCK} 15000",
        f"start {SYNTHETIC} 16200",
        f"warm {STOCK}",
        f"stacks {SYNTHETIC}",
        f"stop {STOCK}",
        f"stop {SYNTHETIC}",
    ]


def test_a_server_left_by_an_error_shows_its_stacks_and_a_dead_one_is_refused(tmp_path: Path, history: list[str]) -> None:
    pool = ServerPool(settings(tmp_path))
    with pytest.raises(RuntimeError, match="timed out"), pool.using(DYNCP):
        raise RuntimeError("timed out")
    with pytest.raises(ServerRefused) as refused:
        pool.ready("b_dead")
    assert refused.value.refusal == "sglang_dcp: no such thing"
    pool.close()
    assert f"stacks {DYNCP}" in history and "stacks b_dead" not in history


def test_the_dry_form_has_one_server_at_a_time(tmp_path: Path, history: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from contextlib import nullcontext

    monkeypatch.setattr(server_pool, "machine_lock", lambda: nullcontext())
    pool = ServerPool(settings(tmp_path, dry=True))
    pool.settle(STOCK, SYNTHETIC)
    assert history == []
    for name in (STOCK, DYNCP):
        pool.ready(name)
    pool.close()
    assert [event.split()[0] for event in history] == ["start", "stop", "start", "stop"]


def test_only_the_server_without_prefill_gets_the_flags_and_the_longest_request(tmp_path: Path) -> None:
    for name in (STOCK, SYNTHETIC, DYNCP):
        server = build_server(name, settings(tmp_path, num_layers=2))
        synthetic = name == SYNTHETIC
        assert (server.flags[-len(WITHOUT_PREFILL) :] == WITHOUT_PREFILL) == synthetic
        assert server.pool_tokens == (LONG_POOL if synthetic else SERVED_POOL) and server.dyncp == (name != STOCK)
        command = server.command()
        first = command.index("--cuda-graph-bs-decode") + 1
        assert command[first : first + len(GRAPH_SIZES)] == [str(size) for size in GRAPH_SIZES]
        assert ("--enable-dyncp" in command) == (name != STOCK)
        # SGLang divides both among the instances.
        assert command[command.index("--max-running-requests") + 1] == str(2 * GRAPH_SIZES[-1])


def test_every_length_of_part_d_fits_the_pool_that_serves_it() -> None:
    assert max(part_step_time.LENGTHS) + part_step_time.NEW_TOKENS <= LONG_POOL
    assert part_step_time.LONGEST_REAL_PREFILL + part_step_time.NEW_TOKENS <= SERVED_POOL


def test_joined_chunks_do_not_change_the_mean_step() -> None:
    single = Streamed(100, 0.0, [0.01 * i for i in range(129)], 129)
    joined = Streamed(100, 0.0, [0.02 * i for i in range(65)], 129)
    assert part_step_time.step_times(single)["mean_ms"] == pytest.approx(10.0)
    assert part_step_time.step_times(joined)["mean_ms"] == pytest.approx(10.0)
    assert part_step_time.step_times(joined)["step_ms"] == pytest.approx(10.0)


def test_a_part_after_the_end_is_left_out_and_f_keeps_its_time(tmp_path: Path) -> None:
    late = settings(tmp_path, deadline=time.monotonic() + 10)
    assert late.limit_s("e") < 0 < late.limit_s("f")
    report = Report({}, tmp_path / "report.json")
    assert report.run(["e"], {"e": lambda *_arguments: pytest.fail("it ran")}, late)
    assert json.loads((tmp_path / "report.json").read_text())["parts"]["e"]["reason"] == "no time is left (--total)"


def test_without_a_pool_parts_that_need_servers_are_left_out(tmp_path: Path) -> None:
    with pytest.raises(Skipped):
        settings(tmp_path, dry=True, servers=False).require_servers()


def test_the_client_finds_a_stand_in_for_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = open_arrivals.importlib.util.find_spec
    monkeypatch.setattr(open_arrivals.importlib.util, "find_spec", lambda name: None if name == "datasets" else find_spec(name))
    environment = client_environment(tmp_path)
    monkeypatch.undo()
    folder = environment["PYTHONPATH"].split(":")[-1]
    source = f"import sys; sys.path.insert(0, {folder!r}); from datasets import load_dataset; load_dataset('x')"
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "datasets is not installed here" in done.stderr


class FakeClient:
    def flush_cache(self) -> bool:
        return True


class FakeOpenServer:
    client, port, model_path = FakeClient(), 1, Path("model")


def slow_client(monkeypatch: pytest.MonkeyPatch, seconds_given: list[float]) -> None:
    def run(command: list[str], *, timeout: float, **_rest: Any) -> None:
        seconds_given.append(timeout)
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(open_arrivals.subprocess, "run", run)


def test_a_rate_that_ran_out_of_time_is_no_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[float] = []
    slow_client(monkeypatch, given)
    server: Any = FakeOpenServer()
    with pytest.raises(OutOfTime):
        try_rate(server, DYNCP, 2.0, settings(tmp_path), {"open": [], "rows": []}, seconds=40.0)
    assert str(try_rate(server, DYNCP, 2.0, settings(tmp_path), {"open": [], "rows": []}, seconds=400.0)).startswith("not done")
    figures: dict[str, Any] = {"open": [], "rows": [], "notes": {}}
    search_rate(server, DYNCP, settings(tmp_path), figures, lambda: None, seconds=45.0)
    assert "had 45 s only" in figures["notes"][f"{DYNCP}, open"]
    assert figures["rows"] == []


def test_placements_of_open_arrivals_are_counted(tmp_path: Path) -> None:
    """The server writes them down as the router does; what an earlier server wrote is gone when one is built."""
    (tmp_path / PLACEMENTS).write_text("of another run")
    server = build_server(DYNCP, settings(tmp_path))
    assert server.environment[LOG_VARIABLE] == str(tmp_path / PLACEMENTS) and placed_degrees(tmp_path) == []
    assert LOG_VARIABLE not in build_server(STOCK, settings(tmp_path)).environment
    log = PlacementLog(tmp_path / PLACEMENTS)
    log.begin(policy="dual-balance")
    loads = [InstanceLoad(rank, 0, 0, 1000) for rank in range(2)]
    for placement in (Placement(0, (0,), (100,)), Placement(1, (0, 1), (64, 36))):
        log.add(1.0, "r", PlacementRequest(100, 1, 1), loads, placement)
    assert placed_degrees(tmp_path) == [1, 2]


def test_what_a_server_places_by_is_noted() -> None:
    ours, stock = FakeServer(DYNCP, []), FakeServer(STOCK, [])
    ours.log = lambda: "[07:00:00] dyncp: cost model a.h200, 94 layers there, 4 here\nmore"  # type: ignore[method-assign]
    assert cost_model_notes(ours, DYNCP) == {"dyncp, cost model": "a.h200, 94 layers there, 4 here"}  # type: ignore[arg-type]
    assert cost_model_notes(stock, STOCK) == {}  # type: ignore[arg-type]


def test_constants_are_given_to_ours_alone(tmp_path: Path) -> None:
    given = settings(tmp_path, cost_model="cpu")
    for name in (DYNCP, SYNTHETIC):
        command = build_server(name, given).command()
        assert command[command.index("--dyncp-cost-model") + 1] == "cpu"
        assert "--dyncp-cost-model" not in build_server(name, settings(tmp_path)).command()
    assert "--dyncp-cost-model" not in build_server(STOCK, given).command()
