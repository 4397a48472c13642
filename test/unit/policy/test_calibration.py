"""The fit recovers known constants, meets its bound on the H100 table, and names bad rows; `calibrate` and `plan` as commands."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from sglang_dcp.cli import calibrate as cli_calibrate
from sglang_dcp.cli import plan as cli_plan
from sglang_dcp.policy.calibration import Measurement, fit_attention, read_measurements
from sglang_dcp.policy.cost_model import load_cost_model

MODELS = ("deepseek-v3", "kimi-k2", "qwen3-235b-a22b")


def run(module, *arguments: str) -> int:
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    return module.run(parser.parse_args(list(arguments)))


def test_known_constants_are_recovered():
    rows = [Measurement("m", n, t, 12 + 0.0005 * n * t + 0.2 * n) for n, t in ((1, 1000), (64, 1000), (8, 65536), (1, 500000))]
    fit = fit_attention(rows, with_rows=True)
    assert (fit.fixed_us, fit.us_per_token, fit.us_per_row) == pytest.approx((12, 0.0005, 0.2), rel=1e-6)
    assert fit.max_error < 1e-6


def test_constants_are_never_negative():
    rows = [Measurement("m", 1, tokens, 0.001 * tokens - 5) for tokens in (10_000, 50_000, 100_000)]
    fit = fit_attention(rows)
    assert fit.fixed_us == 0 and fit.us_per_token > 0


@pytest.mark.parametrize("model", MODELS)
def test_the_h100_table_is_fitted_within_ten_percent_and_is_what_the_data_file_holds(model: str):
    fit = fit_attention([row for row in read_measurements(cli_calibrate.DEFAULT_TABLE) if row.model == model])
    assert fit.max_error <= 0.10
    cost = load_cost_model(f"{model}.h100", 32)
    assert cost.attention_fixed_us == pytest.approx(fit.fixed_us, abs=0.01)
    assert cost.attention_us_per_token == pytest.approx(fit.us_per_token, rel=1e-3)


def test_a_bad_row_is_reported_with_its_line(tmp_path: Path):
    table = tmp_path / "table.csv"
    table.write_text("model,requests,tokens_per_request,microseconds\nm,1,10,5\nm,one,10,5\n", encoding="utf-8")
    with pytest.raises(ValueError, match="line 3"):
        read_measurements(table)


def test_calibrate_writes_a_usable_model_and_reports_failure(tmp_path: Path, capsys):
    out = tmp_path / "mine.json"
    assert run(cli_calibrate, "--model", "deepseek-v3", "--base", "deepseek-v3.h200", "--out", str(out)) == 0
    assert load_cost_model(str(out), 32).attention_us_per_token == pytest.approx(0.0005, rel=0.01)
    assert run(cli_calibrate, "--max-error", "0.001") == 1
    assert run(cli_calibrate, "--out", str(out)) == 2
    assert "--model" in capsys.readouterr().err


def test_plan_prints_placement_and_step(tmp_path: Path, capsys):
    load = tmp_path / "load.json"
    load.write_text(json.dumps({"instances": [{"kv_tokens": 100_000, "home_requests": 20}] * 16}), encoding="utf-8")
    assert run(cli_plan, "--load", str(load), "--prompt", "500000", "--json") == 0, capsys.readouterr().err
    plan = json.loads(capsys.readouterr().out)
    assert plan["degree"] > 1 and sum(plan["shard_tokens"]) == 500_000
    assert plan["step_ms_after"] > plan["step_ms_before"] > 30
    assert run(cli_plan, "--load", str(load), "--prompt", "500000", "--degree", "1", "--home", "3") == 0
    told = capsys.readouterr().out
    assert "home 3, degree 1" in told and "expects 256 of at most 4096 new tokens" in told
    for flags, expected in (["--max-new", "90"], 90), (["--policy", "local"], 4096), (["--expected-new", "7"], 7):
        assert run(cli_plan, "--load", str(load), "--prompt", "5000", "--json", *flags) == 0
        assert json.loads(capsys.readouterr().out)["expected_new_tokens"] == expected
    load.write_text(json.dumps({"instances": [{"kv_tokens": 1, "home_requests": 1, "typo": 1}]}), encoding="utf-8")
    assert run(cli_plan, "--load", str(load), "--prompt", "5") == 2
    assert "typo" in capsys.readouterr().err
