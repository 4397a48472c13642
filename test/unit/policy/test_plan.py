"""`sglang-dcp plan` prices as a server does: by the constants of our runtime, of the pool's element type, for every degree."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from sglang_dcp.cli import plan as cli_plan
from sglang_dcp.policy.cost_model import load_cost_model
from sglang_dcp.policy.served_model import serving_cost

EXAMPLE = Path(__file__).resolve().parents[3] / "docs" / "examples" / "load.json"


def plan(capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    cli_plan.add_arguments(parser)
    assert cli_plan.run(parser.parse_args([*flags, "--json"])) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def test_the_example_of_the_docs_shows_what_the_project_is_for(capsys: pytest.CaptureFixture[str]) -> None:
    """A long prompt in one pool would slow everybody's step by a fifth; spread it adds a fiftieth."""
    found = plan(capsys, "--load", str(EXAMPLE), "--prompt", "400000", "--cost-model", "qwen3-30b-a3b.h200")
    whole = next(price for price in found["prices"] if price["degree"] == 1)
    assert found["degree"] > 1 and whole["fits_now"] and found["fits_now"]
    assert whole["step_ms"] > 1.18 * found["step_ms_before"] and found["step_ms_after"] < 1.02 * found["step_ms_before"]
    assert found["step_ms_after"] == pytest.approx(min(price["step_ms"] for price in found["prices"]), rel=0.01)


def test_a_quantised_pool_holds_twice_and_its_attention_costs_what_was_measured(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    load = tmp_path / "load.json"
    load.write_text(json.dumps({"instances": [{"kv_tokens": 300_000, "home_requests": 30}] * 8}))
    flags = ("--load", str(load), "--prompt", "900000", "--max-new", "100", "--cost-model", "qwen3-30b-a3b.h200")
    plain, quantised = plan(capsys, *flags), plan(capsys, *flags, "--kv-dtype", "fp8_e4m3")
    assert [found["prices"][0]["fits_now"] for found in (plain, quantised)] == [False, True], "whole in one pool"
    assert quantised["step_ms_before"] < plain["step_ms_before"] and not quantised["warnings"]
    models = [serving_cost("qwen3-30b-a3b.h200", 8, dtype).model for dtype in ("bfloat16", "fp8_e4m3")]
    assert models[1].pool_tokens == pytest.approx(2 * models[0].pool_tokens, abs=1)
    saved = models[0].attention_us_per_token - models[1].attention_us_per_token
    assert plain["step_ms_before"] - quantised["step_ms_before"] == pytest.approx(48 * 300_000 * saved / 1000)


def test_what_was_not_measured_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    found = plan(capsys, "--load", str(EXAMPLE), "--prompt", "4000", "--kv-dtype", "fp8_e4m3")
    assert found["warnings"] == ["cost model deepseek-v3.h200 has no constants for K/V in fp8_e4m3: bfloat16's are taken"]
    assert found["cost_model"] == "deepseek-v3.h200, K/V in fp8_e4m3"


def test_a_trace_is_planned_by_the_same_constants(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--trace", str(EXAMPLE.parent / "trace.csv"), "--cost-model", "qwen3-30b-a3b.h200", "--kv-dtype")
    found = [plan(capsys, *flags, dtype) for dtype in ("bfloat16", "fp8_e4m3")]
    assert found[1]["pool_tokens"] == pytest.approx(2 * found[0]["pool_tokens"], abs=1)


def test_a_plan_is_no_simulation_of_the_authors_runtime() -> None:
    """They add their scheduler to every step, and their exchange; ours were measured."""
    authors, ours = load_cost_model("deepseek-v3.h200", 8), serving_cost("deepseek-v3.h200", 8).model
    assert (authors.step_fixed_us, ours.step_fixed_us) == (6400.0, 0.0) and ours.exchange_fixed_us < authors.exchange_fixed_us
