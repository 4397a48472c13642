"""`sglang-dcp calibrate --measure`: what it refuses without a Hopper GPU, the table, and the cost model file that a server takes."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmark.kernels.measured import RESULTS
from benchmark.multi_gpu.model_shapes import SHAPES, SMALL_SHAPES
from sglang_dcp.cli import calibrate
from sglang_dcp.dataflow.measure import decode_rows
from sglang_dcp.dataflow.measure.decode_rows import CASES, Case, DecodeShape
from sglang_dcp.policy.calibration_table import CalibrationTable
from sglang_dcp.policy.served_model import served_cost

FIXED, PER_TOKEN, PER_ROW = 21.0, 0.0006, 0.05


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "qwen3-30b-a3b" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(SMALL_SHAPES["qwen3-30b-a3b"] | {"num_hidden_layers": 48}))
    return path


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> list[DecodeShape]:
    """A card whose kernels take exactly what a fit can say; FP8 four fifths of the time per token. The shapes that were measured."""
    asked: list[DecodeShape] = []

    def measure(shape: DecodeShape, limit_s: float) -> Iterator[tuple[Case, float]]:
        asked.append(shape)
        for case in CASES:
            if limit_s > 0:
                tokens = sum(case.lengths())
                yield case, FIXED + PER_TOKEN * (0.8 if shape.quantised else 1.0) * tokens + PER_ROW * case.requests

    monkeypatch.setattr(decode_rows, "measure", measure)
    monkeypatch.setattr(calibrate, "_card_name", lambda: "NVIDIA H200")
    return asked


def run(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    calibrate.add_arguments(parser)
    return calibrate.run(parser.parse_args([str(argument) for argument in arguments]))


def test_without_a_gpu_it_says_what_to_do(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert not torch.cuda.is_available(), "this test is about machines without one"
    assert run("--measure", tmp_path / "t.json", "--config", config) == 2
    told = capsys.readouterr().err
    assert "torch sees no GPU here" in told and "sglang-dcp calibrate TABLE.json" in told and not (tmp_path / "t.json").exists()
    assert run("--measure", tmp_path / "t.json") == 2 and "--config" in capsys.readouterr().err


def test_another_card_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100")
    assert run("--measure", config.parent / "t.json", "--config", config) == 2
    assert "Hopper" in (told := capsys.readouterr().err) and "NVIDIA A100" in told


@pytest.mark.parametrize(
    ("content", "flags", "told"),
    [
        ("{", (), "not JSON"),
        ("{}", (), "no configuration of a model that is served"),
        (
            json.dumps(SHAPES["deepseek-v3"] | {"num_hidden_layers": 61}),
            ("--attention-backend", "fa3"),
            "latent attention (MLA) is not served",
        ),
        (json.dumps(SHAPES["qwen3-235b-a22b"] | {"num_hidden_layers": 94}), ("--attention-backend", "flashmla"), "grouped-query attention"),
    ],
)
def test_what_is_not_served_is_not_measured(on_a_gpu, tmp_path: Path, capsys, content: str, flags: tuple[str, ...], told: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(content)
    assert run("--measure", tmp_path / "t.json", "--config", path, *flags) == 2
    assert told in capsys.readouterr().err and not on_a_gpu


def test_a_server_takes_what_was_measured(on_a_gpu: list[DecodeShape], config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The measured attention, and all else as it would take it anyway; the table is fitted again to the same constants."""
    table, out = config.parent / "t.json", config.parent / "mine.json"
    assert run("--measure", table, "--config", config, "--out", out) == 0, capsys.readouterr().err
    assert on_a_gpu == [DecodeShape(32, 4, 128, kernel="fa3")]
    assert "those that ship miss by up to" in capsys.readouterr().out
    found = CalibrationTable.read(table)
    assert found.model == "qwen3-30b-a3b" and found.served.card == "h200" and len(found.rows) == len(CASES)
    for size in (2, 4, 8):
        plain, mine = (served_cost(name, found.served, size).model for name in (None, str(out)))
        measured = {"attention_fixed_us": FIXED, "attention_us_per_token": PER_TOKEN, "attention_us_per_row": PER_ROW}
        expected = dataclasses.asdict(dataclasses.replace(plain, **measured, name=mine.name, pool_tokens=None))
        near = {key: pytest.approx(value, rel=1e-3) if isinstance(value, float) else value for key, value in expected.items()}
        assert dataclasses.asdict(mine) == near
    assert run(table) == 0


def test_constants_are_kept_by_element_type(on_a_gpu: list[DecodeShape], config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """bfloat16 first, FP8 into the same file; a server takes those of its pool, and is warned where there are none."""
    table, out = config.parent / "t.json", config.parent / "mine.json"
    quantised = ("--measure", table, "--config", config, "--kv-dtype", "fp8_e4m3")
    assert run("--measure", table, "--config", config, "--out", out) == 0
    served = CalibrationTable.read(table).served
    fp8 = dataclasses.replace(served, kv_element_bytes=1, kv_bytes_per_token=served.kv_bytes_per_token // 2)
    assert "no constants for K/V in fp8_e4m3" in served_cost(str(out), fp8, 2).warnings[0]
    assert run(*quantised, "--base", out, "--out", out) == 0, capsys.readouterr().err
    assert on_a_gpu[-1].quantised
    for model, share in ((served, 1.0), (fp8, 0.8)):
        cost = served_cost(str(out), model, 2)
        assert cost.model.attention_us_per_token == pytest.approx(share * PER_TOKEN, rel=1e-3) and not cost.warnings


def test_the_kernels_of_a_server_are_measured(on_a_gpu: list[DecodeShape], config: Path, tmp_path: Path) -> None:
    """Those that it runs where nobody names a backend, or the one that is named."""
    latent = tmp_path / "config.json"
    latent.write_text(json.dumps(SHAPES["deepseek-v3"] | {"num_hidden_layers": 61}))
    table = tmp_path / "t.json"
    for path, flags in ((config, ("--attention-backend", "flashinfer")), (latent, ()), (latent, ("--kv-dtype", "fp8_e4m3"))):
        run("--measure", table, "--config", path, *flags)
    assert [(shape.kernel, shape.latent, shape.quantised) for shape in on_a_gpu] == [
        ("flashinfer", False, False),
        ("flashinfer", True, False),
        ("flashmla", True, True),
    ]


def test_a_table_that_ended_early_is_not_fitted(on_a_gpu, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = config.parent / "t.json"
    assert run("--measure", table, "--config", config) == 0
    found = json.loads(table.read_text())
    table.write_text(json.dumps(found | {"rows": found["rows"][:5]}))
    assert run(table) == 2 and "5 kernels are too few" in capsys.readouterr().err
    table.write_text(json.dumps({"rows": []}))
    assert run(table) == 2 and "no table of sglang-dcp calibrate --measure" in capsys.readouterr().err


def test_cases_are_idle_and_loaded_with_and_without_a_long_row() -> None:
    assert Case(3, 1000, 4000, 2).lengths() == [1000, 1000, 4000, 0, 0] and Case(2, 1000, padding=0).lengths() == [1000, 1000]
    work: list[Any] = [(case.requests, case.longest_row, case.padding) for case in CASES]
    assert min(work)[0] == 1 and max(work)[0] == 128 and {0, 64} == {padding for _, _, padding in work}
    assert max(sum(case.lengths()) for case in CASES) * 4096 * 2 < 5e9, "bytes of K/V with eight K/V heads"
    assert len(set(work)) == len(work)


def test_measured_tables_are_fitted_well_and_in_time() -> None:
    """Those that are among the results: none needs to be."""
    for path in RESULTS.glob("attention_*.json"):
        assert CalibrationTable.read(path).seconds < 120 and run(path) == 0
