"""Several runs as one result: what is merged, what is refused, which ratio is the lowest; and the page of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmark.headline.summary import SPLIT, lowest_ratios, main, main_case, merge, short_step, summarise
from scripts.result_pages.headline import render_of

BOUNDS = json.loads(SPLIT.with_name("headline_bounds.json").read_text())
CURVES = {"stock": {4: 18.0, 6: 32.0}, "whole": {6: 19.0, 8: 28.0}, "ours": {6: 15.0, 8: 19.0, 10: 27.0}}


def at(rate: float, p99: float, **changes: Any) -> dict[str, Any]:
    point = {"requests_per_s": rate, "requests": 300, "p50_tpot_ms": p99 - 2, "p99_tpot_ms": p99, "mean_tpot_ms": p99 - 2}
    return point | {"p99_ttft_s": 0.1, "failed": {}, "kv_max_over_mean": None, "degrees": {"1": 9}} | changes


def case(curves: dict[str, dict[int, float]]) -> dict[str, Any]:
    return {name: {"what": name, "flags": [], "points": [at(rate, p99) for rate, p99 in curve.items()]} for name, curve in curves.items()}


def run(cases: dict[str, Any], **changes: Any) -> dict[str, Any]:
    facts = {"command": "run", "commit": "abc", "machine": "2 x H200", "model": "m", "layers": 48, "pool_tokens": 100, "longest": 50}
    return facts | {"longest_output": 10, "prefill": "none", "cases": cases} | changes


def test_runs_of_equal_facts_are_one_part() -> None:
    found = merge(
        [run({"0.03|1": case({"ours": {6: 15.0}})}), run({"0.03|1": case({"ours": {4: 12.0}, "stock": {4: 18.0}})}, command="again")]
    )
    assert [point["requests_per_s"] for point in found["cases"]["0.03|1"]["ours"]["points"]] == [4, 6] and "stock" in found["cases"][
        "0.03|1"
    ]
    assert found["command"] == "run; again" and found["commit"] == "abc" and "commit" not in found["cases"]["0.03|1"]["stock"]["points"][0]
    two = merge([run({"0.03|1": case({"ours": {6: 15.0}})}), run({"0.03|2": case({"ours": {6: 15.0}})}, commit="def")])
    assert two["commit"] == "abc, def" and two["cases"]["0.03|2"]["ours"]["points"][0]["commit"] == "def"


def test_other_facts_and_points_measured_twice_are_refused() -> None:
    one = run({"0.03|1": case({"ours": {6: 15.0}})})
    with pytest.raises(ValueError, match=r"0.03\|1, ours, 6 requests/s: measured in two"):
        merge([one, one])
    loaded = {"0.03|1": {"ours": {"what": "", "flags": [], "points": [at(8, 9.0, seconds=20.0, history_ms=20.0)]}}}
    with pytest.raises(ValueError, match="points of different windows"):
        merge([one, run(loaded)])
    with pytest.raises(ValueError, match="layers: 48 and 12"):
        merge([one, run({}, layers=12)])
    with pytest.raises(ValueError, match="four_gpus; the result needs one of two_gpus"):
        summarise([run({}, machine="4 x H200")])


def test_the_loaded_short_step_is_the_lowest_at_the_highest_rate_without_long_prompts() -> None:
    cases = {"0|1": case({"stock": {12: 22.0, 8: 15.0}, "ours": {12: 20.0}}), "0.03|1": case(CURVES)}
    assert short_step(cases) == {"ms": 18.0, "case": "0|1", "contender": "ours", "requests_per_s": 12}
    assert short_step({"0.03|1": case(CURVES)}) is None


def test_the_case_at_the_top_does_not_depend_on_the_order_of_seeds() -> None:
    none_held = case({"stock": {4: 40.0}, "whole": {6: 19.0}, "ours": {6: 15.0}})
    for seeds in (("1", "4"), ("4", "1")):
        cases = {f"0.03|{seed}": none_held if seed == "1" else case(CURVES) for seed in seeds} | {"0|1": case(CURVES)}
        assert main_case(cases, 25.0) == "0.03|4", "where every contender holds a rate"
        assert main_case({f"0.03|{seed}": case(CURVES) for seed in seeds}, 25.0) == "0.03|1"


def test_the_lowest_ratio_is_of_rates_where_both_were_bisected() -> None:
    found = lowest_ratios("0.03|1", case(CURVES), [25.0, 100.0])
    assert found == [{"ratio": round(9.5 / 7.333, 3), "case": "0.03|1", "against": "whole", "how": "highest rate at 25 ms"}]


def test_the_lowest_ratio_is_else_of_p99_at_equal_rates() -> None:
    found = lowest_ratios(
        "0|1", case({"stock": {8: 16.0, 12: 20.0}, "whole": {12: 19.0}, "ours": {12: 20.0}, "ours-flashinfer": {12: 5.0}}), [25.0]
    )
    assert found == [{"ratio": 0.95, "case": "0|1", "against": "whole", "how": "P99 TPOT at 12 requests/s"}]
    assert (
        lowest_ratios("0|1", case({"ours": {12: 20.0}}), [25.0]) == [] and lowest_ratios("0|1", case({"stock": {12: 20.0}}), [25.0]) == []
    )
    assert lowest_ratios("0|1", case({"stock": {8: 20.0}, "ours": {12: 20.0}}), [25.0]) == []


def test_a_summary_has_the_figures_that_the_bars_name_and_a_page() -> None:
    runs = [
        run({"0.03|1": case(CURVES), "0|1": case({"stock": {12: 17.0}, "ours": {12: 17.2}}), "weka|2": case({"ours": {1: 20.0}})}),
        run({"0.03|1": case({"whole": {8: 21.0}, "ours": {8: 20.0}})}, machine="4 x H200"),
        run({"0.03|1": case({"stock": {2: 40.0}, "ours": {2: 30.0}})}, prefill="real"),
    ]
    found = summarise(runs)
    two = found["two_gpus"]
    assert two["limit_ms"] == 22.5 and two["case"] == "0.03|1" and set(two["by_limit"]) == {"20", "22.5", "25", "30", "40", "60"}
    assert two["by_limit"]["25"]["rates"] == {"stock": 5.0, "whole": 7.333, "ours": 9.5}
    assert two["by_limit"]["25"]["rate_over_stock"] == 1.9 and "p99_over_stock" in two["by_limit"]["40"]
    assert two["p99_over_stock"] == two["by_limit"]["60"]["p99_over_stock"] and two["p99_limit_ms"] == 60.0
    assert found["lowest_ratio_any_mix"] == round(17.0 / 17.2, 3) and found["lowest_ratio_is"]["case"] == "0|1"
    assert two["lowest_by_case"]["0.03|1"]["against"] == "whole" and set(two["by_case"]) == {"0.03|1", "0|1", "weka|2"}
    assert found["four_gpus"]["cases"] and found["four_gpus"]["rate_over_whole"] == 1.0
    assert found["two_gpus_real_prefill"]["prefill"] == "real" and found["long_row_ratio"] == 1.005
    text = render_of(found | {"notes": ["made up"]}, json.loads(SPLIT.read_text()), BOUNDS)
    assert "Each point is a window" not in text
    loaded = run({"0.03|1": {"ours": {"what": "", "flags": [], "points": [at(8, 9.0, seconds=20.0, history_ms=20.0)]}}})
    page = render_of(summarise([loaded]) | {"notes": []}, json.loads(SPLIT.read_text()), BOUNDS)
    assert "a window of 20 s" in page and "20 ms a token" in page and "first 15 %" in page
    behind = run({"0.03|1": case({"stock": {4: 10.0, 7: 40.0}, "ours": {8: 20.0}})})
    assert "| 2.0 (7 against 8 requests/s) |" in render_of(summarise([behind]) | {"notes": []}, json.loads(SPLIT.read_text()), BOUNDS)
    for part in ("## Other mixes and seeds", "Weka), seed 2:", "## Four gpus", "## Two gpus real prefill", "Lowest of ours", "| 22.5 |"):
        assert part in text


def test_runs_without_predictions_are_not_summarised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, output = tmp_path / "run.json", tmp_path / "headline.json"
    path.write_text(json.dumps(run({"0.03|1": case(CURVES)})))
    monkeypatch.setattr("sys.argv", ["summary", str(path), "--output", str(output), "--note", "made up"])
    with pytest.raises(SystemExit):
        main()
    assert "benchmark.headline.predict" in capsys.readouterr().err and not output.exists()
    path.write_text(json.dumps(run({"0.03|1": case(CURVES)}, predictions="yes")))
    assert main() == 0 and json.loads(output.read_text())["notes"] == ["made up"]
