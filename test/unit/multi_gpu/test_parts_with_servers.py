"""Parts (b), (d), (e) and (f) from start to end against servers that only answer: rows, predictions, order of servers, failures by case."""

from __future__ import annotations

import json
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmark.multi_gpu import open_arrivals, part_serving, part_step_time, part_tokens, predictions, server_pool
from benchmark.multi_gpu.report import Report, violations
from benchmark.multi_gpu.server_pool import DYNCP, STOCK, SYNTHETIC, ServerPool
from benchmark.multi_gpu.settings import Settings
from benchmark.multi_gpu.streams import Streamed
from benchmark.multi_gpu.table import format_report
from testing.client import Answer, Token

HEAD = {"command": "x", "commit": "y", "machine": "2 x NVIDIA H100", "num_gpus": 2, "dry": False}
MODULES = {"b": part_tokens, "d": part_step_time, "e": part_serving, "f": predictions}


class AnsweringServer:
    """A server of the pool, its client at once. broken: prompts from this length on are refused."""

    model_path, instances, alive, port = Path("model"), 2, True, 1

    def __init__(self, name: str, history: list[str], broken: int = 10**9) -> None:
        self.name, self.history, self.broken, self.dyncp = name, history, broken, not name.endswith(STOCK)
        self.ready_s: float | None = None
        self.degree = 0

    @property
    def client(self) -> AnsweringServer:
        return self

    def start(self, _folder: Path, _port: int) -> None:
        self.history.append(f"start {self.name}")

    def flush_cache(self) -> bool:
        return True

    def log(self) -> str:
        return "I dyncp: cost model some.h200, 94 layers there, 4 here\nready" if self.dyncp else "ready"

    def generate(self, ids: Any, *, max_new_tokens: int, sampling: dict[str, Any] | None = None, **_fields: Any) -> Answer:
        degree = (sampling or {}).get("custom_params", {}).get("dyncp", {}).get("degree")
        rng = random.Random(len(ids))
        tokens = tuple(Token(rng.randrange(256), -rng.random(), 1.0) for _ in range(max_new_tokens))
        return Answer("", (), {"dyncp": {"degree_end": degree}} if self.dyncp else {}, (), tokens)


def answer(client: AnsweringServer, ids: Any, new_tokens: int, sampling: dict[str, Any]) -> Streamed:
    if len(ids) >= client.broken:
        raise RuntimeError(f"a prompt of {len(ids)} tokens was refused")
    degree = sampling.get("custom_params", {}).get("dyncp", {}).get("degree", 1)
    times = [10.0 + 0.01 * chunk for chunk in range(new_tokens // 4 + 1)]
    shards = [{"rank": rank, "tokens": len(ids) // degree} for rank in range(degree)]
    where = {"dyncp": {"home": 0, "shards": shards, "degree_end": degree}} if client.dyncp else {"dp_rank": 1}
    return Streamed(len(ids), 0.0, times, new_tokens, where)


def bench(command: list[str], **_keywords: Any) -> subprocess.CompletedProcess[str]:
    flags = dict(zip(command, command[1:], strict=False))
    rate, count = float(flags["--request-rate"]), int(flags["--num-prompts"])
    result = {"completed": count, "duration": count / rate, "concurrency": 3.0, "mean_tpot_ms": 4.0, "p99_tpot_ms": 10 * rate}
    result |= {"mean_ttft_ms": 50.0, "p99_ttft_ms": 90.0, "output_throughput": 100.0}
    Path(flags["--output-file"]).write_text(json.dumps(result) + "\n")
    return subprocess.CompletedProcess(command, 0, "", "")


@pytest.fixture
def history(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    events: list[str] = []
    steps = iter(range(0, 10**6, 5))

    def wait_ready(servers: list[Any], _deadline: float) -> None:
        for server in servers:
            server.ready_s = 1.0

    def counts(_server: Any) -> dict[str, float]:
        return dict.fromkeys(("graph", "sharded_graph", "eager"), float(next(steps)))

    monkeypatch.setattr(server_pool, "find_free_port", lambda first, _last: first)
    monkeypatch.setattr(server_pool, "wait_ready", wait_ready)
    monkeypatch.setattr(server_pool, "stop_all", lambda servers: events.extend(f"stop {server.name}" for server in servers))
    for module in (part_step_time, part_serving, part_tokens):
        monkeypatch.setattr(module, "settled_counts", counts)
    monkeypatch.setattr(part_step_time, "stream", answer)
    monkeypatch.setattr(part_serving, "stream_all", lambda client, prompts, new: [answer(client, ids, new, {}) for ids in prompts])
    monkeypatch.setattr(open_arrivals.subprocess, "run", bench)
    monkeypatch.setattr(part_step_time, "LENGTHS", (65_536, 262_144, 1_048_576))
    monkeypatch.setattr(part_step_time, "prompt", lambda length, _seed: range(length))
    monkeypatch.setattr(part_serving, "prompt", lambda length, _seed: range(length))
    return events


def run_parts(tmp_path: Path, history: list[str], monkeypatch: pytest.MonkeyPatch, *, broken: int = 10**9) -> tuple[bool, dict[str, Any]]:
    monkeypatch.setattr(server_pool, "build_server", lambda name, _settings: AnsweringServer(name, history, broken))
    facts = {"names": ["NVIDIA H100 80GB HBM3"] * 2}
    settings = Settings(2, tmp_path / "report.json", tmp_path, num_layers=6, facts=facts, letters=tuple("bdef"))
    settings = Settings(**(vars(settings) | {"pool": ServerPool(settings)}))
    report = Report(dict(HEAD), settings.out)
    succeeded = report.run(list("bdef"), {letter: module.run for letter, module in MODULES.items()}, settings)
    assert settings.pool is not None
    settings.pool.close()
    written = json.loads(settings.out.read_text())
    assert violations(written) == [] and "(f)" in format_report(written)
    return succeeded, written["parts"]


def test_all_parts_share_their_servers(tmp_path: Path, history: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    succeeded, parts = run_parts(tmp_path, history, monkeypatch)
    assert succeeded, {letter: part["reason"] for letter, part in parts.items()}
    assert [(row["model"], row["degree"], row["equal"]) for row in parts["b"]["figures"]["rows"]] == [
        (model, degree, True) for model in ("gqa", "mla") for degree in (1, 2)
    ]
    steps = parts["d"]["figures"]["rows"]
    assert [(row["server"], row["degree"]) for row in steps] == [(SYNTHETIC, 1), (SYNTHETIC, 2)] * 3 + [(STOCK, 1)] * 3
    assert all(row["step_ms"] == pytest.approx(2.5, rel=0.02) and row["predicted_ms"] > 0 for row in steps[:8])
    assert steps[1]["sharded_graph_steps"] == 5.0 and steps[8]["reason"] == "needs a synthetic prefill"
    closed = [row for row in parts["e"]["figures"]["rows"] if row["what"] == "e1 closed"]
    assert [(row["server"], row["population"], row["prefill"]) for row in closed] == [
        (SYNTHETIC, "trace", "synthetic"),
        (SYNTHETIC, "one long", "synthetic"),
        (STOCK, "trace", "real"),
        (STOCK, "one long", "real"),
    ]
    held = {row["server"]: row["requests_per_s"] for row in parts["e"]["figures"]["rows"] if row["what"] == "e2 highest rate"}
    assert held == {DYNCP: 5.0, STOCK: 5.0}
    predicted = {line["part"] for line in parts["f"]["figures"]["rows"]}
    assert predicted == {"d", "e1", "e2"}
    small = ["b_gqa_stock", "b_gqa", "b_mla_stock", "b_mla"]
    starts = [*small, STOCK, SYNTHETIC]
    assert history[:6] == [f"start {name}" for name in starts] and history[6:10] == [f"stop {name}" for name in small]
    assert history[10:] == [f"stop {SYNTHETIC}", f"start {DYNCP}", f"stop {STOCK}", f"stop {DYNCP}"]


def test_a_case_that_fails_leaves_the_others(tmp_path: Path, history: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    succeeded, parts = run_parts(tmp_path, history, monkeypatch, broken=200_000)
    assert not succeeded and parts["b"]["status"] == "done"
    steps = parts["d"]["figures"]["rows"]
    assert [row["step_ms"] is None for row in steps] == [False, False, True, True, True, True, False, True, True]
    assert "262144 tokens, degree 2: RuntimeError" in parts["d"]["reason"] and "was refused" in steps[2]["reason"]
    assert [row["population"] for row in parts["e"]["figures"]["rows"] if row["what"] == "e1 closed"] == ["trace", "trace"]
    assert "one long" in parts["e"]["reason"] and any(row["what"] == "e2 highest rate" for row in parts["e"]["figures"]["rows"])
