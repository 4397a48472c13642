"""The report's pieces, without processes: sections, rows and their plans, decode windows, judgement of a rate, predictions."""

from __future__ import annotations

import importlib.util
import json
import time
from pathlib import Path
from typing import Any

import pytest

from benchmark.multi_gpu import predictions
from benchmark.multi_gpu.exchange_cases import ROW_SHAPES, ExchangeCase, exchange_cases, step_plan
from benchmark.multi_gpu.model_shapes import SHAPES
from benchmark.multi_gpu.open_arrivals import bench_command, judge, write_dataset
from benchmark.multi_gpu.part_serving import populations, trace_lengths
from benchmark.multi_gpu.part_transport import fits
from benchmark.multi_gpu.ranks import _blame
from benchmark.multi_gpu.report import Report, violations
from benchmark.multi_gpu.settings import PartFailed, Settings, Skipped
from benchmark.multi_gpu.streams import Streamed, decode_window, placement
from benchmark.multi_gpu.table import format_report, format_rows
from sglang_dcp.policy.cost_model import load_cost_model

HEAD = {"command": "x", "commit": "y", "machine": "z", "num_gpus": 4, "dry": True}


def settings(tmp_path: Path, **changes: Any) -> Settings:
    return Settings(num_gpus=4, out=tmp_path / "report.json", work=tmp_path, dry=True, servers=False, **changes)


def run(tmp_path: Path, part: Any, **changes: Any) -> tuple[bool, dict[str, Any]]:
    report = Report(dict(HEAD), tmp_path / "report.json")
    succeeded = report.run(["a"], {"a": part}, settings(tmp_path, **changes))
    written = json.loads((tmp_path / "report.json").read_text())
    assert violations(written) == [] and "(a)" in format_report(written)
    return succeeded, written["parts"]["a"]


def test_a_part_that_hangs_fails_at_its_limit_and_keeps_its_figures(tmp_path: Path) -> None:
    def part(_settings: Settings, figures: dict[str, Any], save: Any) -> None:
        figures["rows"].append({"us": 1.0})
        save()
        time.sleep(30)

    began = time.monotonic()
    succeeded, section = run(tmp_path, part, seconds={"a": 0.2})
    assert not succeeded and time.monotonic() - began < 20
    assert section["status"] == "failed" and section["reason"].startswith("not finished after 0.2 s")
    assert section["figures"]["rows"] == [{"us": 1.0}]


@pytest.mark.parametrize(
    ("error", "status", "succeeded"),
    [(Skipped("no GPU"), "skipped", True), (PartFailed("wrong"), "failed", False), (KeyError("rows"), "failed", False)],
)
def test_an_error_becomes_a_section(tmp_path: Path, error: Exception, status: str, succeeded: bool) -> None:
    def part(*_arguments: Any) -> None:
        raise error

    found, section = run(tmp_path, part)
    assert (found, section["status"]) == (succeeded, status)
    assert str(error) in section["reason"]


def test_a_malformed_report_is_noticed() -> None:
    section = {"title": "t", "status": "done", "reason": None, "figures": {"rows": [{"us": 1.0}]}}
    assert violations(HEAD | {"parts": {"a": section}}) == []
    for change in ({"status": "fine"}, {"reason": "why"}, {"figures": {"rows": []}}, {"figures": {"rows": [{"us": [1]}]}}, {"figures": {}}):
        assert violations(HEAD | {"parts": {"a": section | change}}), change
    assert violations({"parts": {}}) and violations(HEAD | {"parts": {"z": section}})


def test_the_rank_that_died_is_blamed_not_those_that_lost_it() -> None:
    text = _blame({0: "raised RuntimeError: connection closed", 2: "ended without a result (exit code -9)", 3: "raised RuntimeError"})
    assert text.startswith("rank 2 ended") and "rank 0, 3" in text


@pytest.mark.parametrize("num_instances", [2, 4, 8])
@pytest.mark.parametrize("degree", [1, 2])
def test_plans_of_all_ranks_fit_together(num_instances: int, degree: int) -> None:
    shape = ROW_SHAPES["tiny"]
    cases = [*exchange_cases(num_instances, ("tiny",), (1, 3)), ExchangeCase(shape, "uneven", tuple(range(num_instances)), degree)]
    for case in cases:
        plans = [step_plan(case, rank) for rank in range(num_instances)]
        for source, plan in enumerate(plans):
            assert list(map(len, plan.send_queries)) == [p.receive_query_splits[source] for p in plans]
            assert len(plan.send_queries[source]) == 0
        busiest = max(max(sum(map(len, plan.send_queries)), plan.num_received) for plan in plans)
        assert case.routed_rows() == busiest


def test_nanocp_beside_a_row() -> None:
    case = ExchangeCase(ROW_SHAPES["deepseek-v3"], "one home", (8, 0, 0, 0), 4)
    assert case.nanocp_us() == pytest.approx(15.8 + 24 * 128 * (576 + 512 + 1) * 2 / 361e3)


def test_a_fit_finds_what_was_put_in() -> None:
    rows = [
        {"transport": "peer", "shape": "s", "pattern": "p", "bytes": count * 1000, "graph_us": 7.0 + count * 1000 / 300e3, "total_us": 0.0}
        for count in (1, 8, 64)
    ]
    assert fits(rows) == [{"transport": "peer", "shape": "s", "pattern": "p", "fixed_us": 7.0, "gb_per_s": 300.0}]


def streamed(times: list[float], **meta: Any) -> Streamed:
    return Streamed(100, 0.0, times, len(times), meta)


def test_only_the_time_in_which_all_decode_counts() -> None:
    early = streamed([0.0, 5.0, *(10.0 + 0.1 * i for i in range(1, 41))])
    late = streamed([10.0 + 0.1 * i for i in range(61)])
    window = decode_window([early, late], least_tokens=8)
    assert window["step_ms"] == pytest.approx(100, rel=0.05) and window["window_s"] == pytest.approx(4.0)
    with pytest.raises(ValueError, match="more output tokens are needed"):
        decode_window([streamed([0.0, 1.0]), streamed([5.0, 6.0])], least_tokens=1)


def test_a_placement_is_read_from_ours_and_from_stock() -> None:
    ours = streamed([0.0], dyncp={"home": 1, "shards": [{"rank": 1, "tokens": 60}, {"rank": 3, "tokens": 40}]})
    assert placement(ours) == (1, [(1, 60), (3, 40)])
    assert placement(streamed([0.0], dp_rank=2)) == (2, [(2, 101)])


def test_a_rate_is_held_by_all_three_measures() -> None:
    good = {"completed": 100, "p99_tpot_ms": 40.0, "duration": 12.0}
    assert judge(good, 10.0, 100, 50.0) is None
    assert "completed" in str(judge(good | {"completed": 99}, 10.0, 100, 50.0))
    assert "P99" in str(judge(good | {"p99_tpot_ms": 51.0}, 10.0, 100, 50.0))
    assert "arrivals" in str(judge(good | {"duration": 60.0}, 10.0, 100, 50.0))


def test_the_client_has_every_flag_that_it_is_given(tmp_path: Path) -> None:
    spec = importlib.util.find_spec("sglang")
    assert spec is not None and spec.submodule_search_locations
    source = (Path(spec.submodule_search_locations[0]) / "benchmark" / "serving.py").read_text()
    for flag in bench_command(1, tmp_path, tmp_path, 1.0, 1, tmp_path):
        assert not flag.startswith("--") or f'"{flag}"' in source, flag


def test_workloads(tmp_path: Path) -> None:
    mean = write_dataset(tmp_path / "set.jsonl", 5, 400)
    lines = [json.loads(text) for text in (tmp_path / "set.jsonl").read_text().splitlines()]
    lengths = [tuple(len(turn["content"]) for turn in line["conversations"]) for line in lines]
    assert lengths == trace_lengths(5, 400) and mean == pytest.approx(sum(p + o / 2 for p, o in lengths) / 5)
    for lengths_of_one in populations(settings(tmp_path)).values():
        assert len(lengths_of_one) == 8 and max(lengths_of_one) <= 600


def test_spreading_a_long_request_is_predicted_to_pay_on_a_gpu() -> None:
    model = load_cost_model("qwen3-235b-a22b.h100", 4)
    times = [predictions.step_ms(model, 4, [(0, predictions.spread_evenly(1_048_576, degree, 0, 4))]) for degree in (1, 2, 4)]
    assert times[0] > times[1] > times[2]
    assert sum(tokens for _, tokens in predictions.spread_evenly(101, 4, 2, 4)) == 101


def test_shapes_are_those_of_the_cost_models() -> None:
    for name in SHAPES:
        assert load_cost_model(f"{name}.h200", 8).num_layers > 4
        row = ROW_SHAPES[name]
        assert row.num_heads == SHAPES[name]["num_attention_heads"]
    assert ROW_SHAPES["deepseek-v3"].qk_head_dim == SHAPES["deepseek-v3"]["kv_lora_rank"] + SHAPES["deepseek-v3"]["qk_rope_head_dim"]


def test_rows_of_other_columns_get_their_own_heading() -> None:
    lines = format_rows([{"a": 1, "b": None}, {"a": 2.5, "b": "x"}, {"c": True}])
    assert len(lines) == 5 and lines[0].split() == ["a", "b"] and lines[3].split() == ["c"]
