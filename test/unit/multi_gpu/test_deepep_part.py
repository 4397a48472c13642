"""Part (c) without GPUs: which modes are tried, and what becomes of the part when kernels, stock or ours do not work."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmark.multi_gpu import deepep_rank, part_deepep
from benchmark.multi_gpu.report import Report, violations
from benchmark.multi_gpu.settings import Settings
from benchmark.multi_gpu.table import format_report

HEAD = {"command": "x", "commit": "y", "machine": "2 x NVIDIA H100", "num_gpus": 2, "dry": False}
WORKING = dict.fromkeys(("low_latency", "normal", *part_deepep.GEMMS), "ok, off_by 0.01")


def row(degree: int, **changes: Any) -> dict[str, Any]:
    return {"degree": degree, "equal": True, "sharded_graph_steps": 100.0 * (degree - 1)} | changes


class Machine:
    """What works on it: kernels by name, servers by name; rows by mode."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kernels = dict(WORKING)
        self.broken: set[str] = set()
        self.rows: dict[str, list[dict[str, Any]]] = {mode: [row(1), row(2)] for mode in part_deepep.MODE_FLAGS}
        self.served: list[str] = []
        monkeypatch.setattr(importlib.util, "find_spec", lambda _name: object())
        monkeypatch.setattr(part_deepep, "try_all_kernels", lambda _settings: self.kernels)
        monkeypatch.setattr(part_deepep, "build_servers", lambda _settings, mode: (self._server(mode), self._server(f"{mode}_stock")))
        monkeypatch.setattr(part_deepep, "started", self._started)
        monkeypatch.setattr(part_deepep, "ask_all", lambda _server, prompts, _pins: prompts)
        monkeypatch.setattr(part_deepep, "step_ms", lambda _server, _sampling: 2.5)
        monkeypatch.setattr(part_deepep, "compare_degrees", lambda _ours, _prompts, _expected, mode: [dict(r) for r in self.rows[mode]])

    def _server(self, name: str) -> SimpleNamespace:
        self.served.append(name)
        return SimpleNamespace(name=name, ready_s=None if name in self.broken else 1.0, log=lambda: "it broke", uses_peer_memory=True)

    @staticmethod
    @contextmanager
    def _started(_settings: Settings, *_servers: Any, limit_s: float) -> Iterator[None]:
        assert 0 < limit_s < 420
        yield

    def run(self, tmp_path: Path, **changes: Any) -> dict[str, Any]:
        settings = Settings(2, tmp_path / "report.json", tmp_path, facts={"names": ["NVIDIA H100"] * 2}, **changes)
        report = Report(dict(HEAD), settings.out)
        report.run(["c"], {"c": part_deepep.run}, settings)
        written = report.head | {"parts": report.sections}
        assert violations(written) == [] and "(c)" in format_report(written)
        return report.sections["c"]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


def test_auto_is_enough(machine: Machine, tmp_path: Path) -> None:
    section = machine.run(tmp_path)
    assert section["status"] == "done" and machine.served == ["auto", "auto_stock"]
    assert [(r["degree"], r["step_ms"], r["stock_step_ms"]) for r in section["figures"]["rows"]] == [(1, 2.5, 2.5), (2, 2.5, 2.5)]
    assert section["figures"]["notes"]["--deepep-mode auto"] == "served"


def test_without_low_latency_kernels_normal_mode_is_served(machine: Machine, tmp_path: Path) -> None:
    machine.kernels["low_latency"] = "failed: no such device"
    section = machine.run(tmp_path)
    assert section["status"] == "done" and machine.served == ["normal", "normal_stock"]
    assert "no such device" in section["figures"]["notes"]["--deepep-mode auto"]


def test_what_stock_does_not_serve_is_skipped(machine: Machine, tmp_path: Path) -> None:
    machine.broken = {"auto", "auto_stock"}
    section = machine.run(tmp_path)
    assert section["status"] == "done" and machine.served[2:] == ["normal", "normal_stock"]
    assert "stock does not serve it here" in section["figures"]["notes"]["--deepep-mode auto"]
    machine.broken = {"auto_stock", "normal_stock"}
    section = machine.run(tmp_path)
    assert section["status"] == "skipped" and "it broke" in section["reason"]


def test_what_stock_serves_and_ours_does_not_is_a_failure_even_if_the_other_mode_works(machine: Machine, tmp_path: Path) -> None:
    machine.broken = {"auto"}
    section = machine.run(tmp_path)
    assert section["status"] == "failed" and "auto: ServerRefused" in section["reason"]
    assert machine.served[2:] == ["normal", "normal_stock"] and len(section["figures"]["rows"]) == 2


@pytest.mark.parametrize(
    ("rows", "reason"),
    [([row(1), row(2, equal=False)], "answers differ"), ([row(1), row(2, sharded_graph_steps=0.0)], "no sharded step ran as a graph")],
)
def test_wrong_answers_and_missing_graphs_fail(machine: Machine, tmp_path: Path, rows: list[dict[str, Any]], reason: str) -> None:
    machine.rows["auto"] = rows
    section = machine.run(tmp_path)
    assert section["status"] == "failed" and reason in section["reason"]


def test_normal_mode_has_no_graphs_to_miss(machine: Machine, tmp_path: Path) -> None:
    machine.rows["normal"] = [row(1), row(2, sharded_graph_steps=0.0)]
    assert machine.run(tmp_path, deepep_mode="normal")["status"] == "done" and machine.served == ["normal", "normal_stock"]


def test_graphs_of_each_instance_s_own_batch_are_tried_when_asked_for(machine: Machine, tmp_path: Path) -> None:
    machine.rows["own-batch"] = [row(1), row(2, sharded_graph_steps=0.0)]
    section = machine.run(tmp_path, deepep_mode="own-batch")
    assert section["status"] == "failed" and "no sharded step ran as a graph" in section["reason"]
    machine.rows["own-batch"] = [row(1), row(2)]
    assert machine.run(tmp_path, deepep_mode="own-batch")["status"] == "done" and machine.served == ["own-batch", "own-batch_stock"] * 2


def test_a_missing_package_is_named(machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "deep_ep" else object())
    section = machine.run(tmp_path)
    assert section["status"] == "skipped" and section["reason"] == "sgl-deep-ep not installed"


def test_a_row_that_is_no_number_is_not_taken_for_equal() -> None:
    assert deepep_rank._judge({"eager": 0.01, "graph": 0.02}) == {"off_by": 0.02}
    for worst in (0.2, float("nan"), float("inf")):
        with pytest.raises(RuntimeError, match="graph: a row is off"):
            deepep_rank._judge({"eager": 0.01, "graph": worst})


def test_the_servers_differ_in_dyncp_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(part_deepep.random_models, "write_model", lambda name, folder: folder / name)
    ours, stock = part_deepep.build_servers(Settings(2, tmp_path / "r.json", tmp_path), "auto")
    assert ours.dyncp and not stock.dyncp
    assert set(ours.flags) < set(stock.flags) and set(stock.flags) - set(ours.flags) >= {"--attn-dp-size", "--ep-size"}
    assert ours.environment == stock.environment and ours.pool_tokens == stock.pool_tokens


def test_modes_are_flags_of_both_servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(part_deepep.random_models, "write_model", lambda name, folder: folder / name)
    for mode, flags in part_deepep.MODE_FLAGS.items():
        for server in part_deepep.build_servers(Settings(2, tmp_path / "r.json", tmp_path), mode):
            assert server.flags[-len(flags) :] == flags and ("--enable-dp-lm-head" in server.flags) == (mode == "own-batch")


def test_the_model_fits_deepep() -> None:
    model = part_deepep.random_models.MODELS[part_deepep.MODEL]
    assert model["hidden_size"] in (2048, 2560, 3072, 4096, 5120, 6144, 7168, 8192), "hidden sizes of DeepEP's low-latency kernels"
    assert model["num_experts"] % 8 == 0 and model["num_experts_per_tok"] == model["num_experts"] <= 9
