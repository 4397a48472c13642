"""`sglang-dcp plan`: the price of every degree, and what a trace would need."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from sglang_dcp.cli import plan
from sglang_dcp.traces.occupancy import arrivals
from sglang_dcp.traces.reader import read_trace

REPOSITORY = Path(__file__).resolve().parents[3]
EXAMPLE = REPOSITORY / "docs" / "examples" / "load.json"
DATA = REPOSITORY / "test" / "data" / "traces"


def run(*flags: str) -> int:
    parser = argparse.ArgumentParser()
    plan.add_arguments(parser)
    return plan.run(parser.parse_args(flags))


def planned(capsys: pytest.CaptureFixture[str], *flags: str) -> dict:
    assert run("--json", *flags) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def test_the_documented_example_shows_what_a_split_gains(capsys: pytest.CaptureFixture[str]) -> None:
    result = planned(capsys, "--load", str(EXAMPLE), "--prompt", "400000")
    steps = {row["degree"]: row["step_ms"] for row in result["prices"]}
    assert list(steps) == list(range(1, 9)) and result["degree"] > 1
    assert result["step_ms_after"] == steps[result["degree"]] == min(steps.values())
    assert steps[1] - result["step_ms_before"] > 3 * (steps[result["degree"]] - result["step_ms_before"])
    short = planned(capsys, "--load", str(EXAMPLE), "--prompt", "2000")
    assert short["degree"] == 1 and short["prices"][0]["step_ms"] == min(row["step_ms"] for row in short["prices"])


def test_every_degree_is_printed_and_the_chosen_one_is_marked(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--load", str(EXAMPLE), "--prompt", "400000") == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if " ms" in line and not line.startswith(("step", "home"))]
    assert [int(row.split()[0]) for row in rows] == list(range(1, 9)) and sum("<- chosen" in row for row in rows) == 1


def test_a_degree_that_cannot_be_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load = tmp_path / "load.json"
    instances = [{"kv_tokens": 0, "home_requests": 0, "kv_capacity": 65_536} for _ in range(3)]
    load.write_text(json.dumps({"instances": instances}))
    prices = planned(capsys, "--load", str(load), "--prompt", "100000")["prices"]
    assert "exceed" in prices[0]["refused"] and [row["degree"] for row in prices if "step_ms" in row] == [2, 3]
    assert run("--load", str(load), "--prompt", "100000") == 0 and "exceed" in capsys.readouterr().out
    assert [row["degree"] for row in planned(capsys, "--load", str(load), "--prompt", "64")["prices"] if "step_ms" in row] == [1]
    assert len(planned(capsys, "--load", str(load), "--prompt", "640", "--policy", "local-least-kv")["prices"]) == 1
    assert run("--load", str(load)) == 2 and "--prompt" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no JSON", "not JSON"),
        ("[]", 'expected {"instances": [...]}'),
        ('{"instances": {}}', 'expected {"instances": [...]}'),
        ('{"instances": [1]}', "instance 0: expected the keys"),
        ('{"instances": [{"kv_tokens": 5}]}', "instance 0: expected the keys"),
        ('{"instances": [{"kv_tokens": 5, "home_requests": 1, "rows": 1}]}', "instance 0: expected the keys"),
        ('{"instances": [{"kv_tokens": "a", "home_requests": 1}]}', "kv_tokens must be a number of at least 0, got 'a'"),
        ('{"instances": [{"kv_tokens": -5, "home_requests": 1}]}', "kv_tokens must be a number of at least 0, got -5"),
        ('{"instances": [{"kv_tokens": NaN, "home_requests": 1}]}', "kv_tokens must be a number of at least 0, got nan"),
        ('{"instances": [{"kv_tokens": 5, "home_requests": -1}]}', "home_requests must be a number of at least 0, got -1"),
        ('{"instances": [{"kv_tokens": 5, "home_requests": 1, "kv_capacity": 0}]}', "kv_capacity must be a number of at least 1, got 0"),
    ],
)
def test_a_load_that_is_none_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str) -> None:
    load = tmp_path / "load.json"
    load.write_text(text)
    assert run("--load", str(load), "--prompt", "100", "--pool-tokens", "100000") == 2
    told = capsys.readouterr().err
    assert f"--load {load}" in told and message in told


def trace_file(path: Path, rows: list[tuple[float, int, int]]) -> str:
    path.write_text("arrival,input,output\n" + "".join(f"{a},{b},{c}\n" for a, b, c in rows))
    return str(path)


def test_a_trace_says_degrees_pools_and_what_fits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [(0.1 * i, 150_000 if i % 20 == 3 else 1_000, 200) for i in range(100)]
    trace = trace_file(tmp_path / "t.csv", [*rows, (10.0, 2_000_000, 10)])
    flags = ["--trace", trace, "--instances", "4", "--pool-tokens", "100000", "--max-new", "200"]
    result = planned(capsys, *flags)
    ours, whole = result["policies"]["dual-balance"], result["policies"]["local-least-kv"]
    assert (result["requests"], result["beyond_one_pool"], result["longest_tokens"]) == (101, 6, 2_000_010)
    assert ours["never_fit"] == 1 and whole["never_fit"] == 6
    assert ours["degree_shares"]["1"] == 0.95 and sum(ours["degree_shares"].values()) == pytest.approx(1.0)
    assert whole["degree_shares"]["1"] == 1.0
    assert ours["pools_needed"] == -(-ours["peak_tokens"] // 100_000) >= 2
    assert run(*flags) == 0
    text = capsys.readouterr().out
    assert "6 of 101 requests are longer than one pool" in text and "never fit" in text and "95.0 %" in text


def test_requests_leave_after_their_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = trace_file(tmp_path / "t.csv", [(1000.0 * i, 500, 10) for i in range(8)])
    result = planned(capsys, "--trace", trace, "--instances", "2", "--pool-tokens", "4096")
    assert result["policies"]["dual-balance"]["peak_requests"] == 1
    assert result["policies"]["dual-balance"]["peak_tokens"] == 510
    crowd = planned(capsys, "--trace", trace, "--instances", "2", "--pool-tokens", "4096", "--rate", "1000", "--max-new", "100")
    assert crowd["policies"]["dual-balance"]["peak_requests"] > 1


def test_bad_rows_are_counted_and_strict_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--trace", str(DATA / "burstgpt.csv"), "--instances", "2", "--pool-tokens", "50000") == 0
    assert "skipped 1 of 4 rows: a failed request (0 response tokens) (line 4)" in capsys.readouterr().out
    assert run("--trace", str(DATA / "burstgpt.csv"), "--instances", "2", "--strict") == 2
    assert "line 4" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rate", "0"], "--rate 0"),
        (["--instances", "0"], "--instances 0"),
        (["--limit", "0"], "--limit 0"),
        (["--cost-model", "nothing"], "no such file"),
    ],
)
def test_bad_flags_are_named(capsys: pytest.CaptureFixture[str], flags: list[str], message: str) -> None:
    assert run("--trace", str(DATA / "table.csv"), *flags) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("source", "flags", "message"),
    [
        ("--trace", ["--prompt", "9"], "--prompt 9 has no effect with --trace"),
        ("--trace", ["--degree", "2"], "--degree 2 has no effect with --trace"),
        ("--trace", ["--home", "0"], "--home 0 has no effect with --trace"),
        ("--trace", ["--expected-new", "0"], "--expected-new 0 has no effect with --trace"),
        ("--load", ["--instances", "4"], "--instances 4 has no effect with --load"),
        ("--load", ["--rate", "2"], "--rate 2.0 has no effect with --load"),
        ("--load", ["--limit", "9"], "--limit 9 has no effect with --load"),
        ("--load", ["--cache-fraction", "0.5"], "--cache-fraction 0.5 has no effect with --load"),
    ],
)
def test_a_flag_that_would_be_passed_over_is_refused(
    capsys: pytest.CaptureFixture[str], source: str, flags: list[str], message: str
) -> None:
    files = {"--trace": [str(DATA / "table.csv")], "--load": [str(EXAMPLE), "--prompt", "100"]}
    assert run(source, *files[source], *flags) == 2
    assert message in capsys.readouterr().err


def test_requests_of_a_tick_are_spread_over_it_and_the_clock_is_stretched() -> None:
    trace = read_trace(DATA / "mooncake.jsonl")
    assert [item.arrival_s for item in arrivals(trace, None, 10)] == pytest.approx([0, 1.5, 3, 5.999])
    fast = arrivals(trace, 2 * len(trace.requests) / trace.span_s, 10)
    assert [item.arrival_s for item in fast] == pytest.approx([0, 0.75, 1.5, 2.9995])
    assert len(arrivals(trace, None, 3)) == 3


def conversations(path: Path, ids_of: Callable[[int, int], list[int]]) -> str:
    """Two conversations of ten turns, turn by turn 1,024 tokens longer, in Mooncake's form."""
    rows = []
    for turn in range(10):
        for talk in range(2):
            ids = ids_of(talk, 4 + 2 * turn)
            arrival_ms = 60_000 * turn + 1000 * talk
            rows.append({"timestamp": arrival_ms, "input_length": 512 * len(ids), "output_length": 10, "hash_ids": ids})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_what_a_cache_is_worth_for_a_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By hand: of the turns behind the first 40 %, all but the last 1,024 tokens were there a turn before."""
    trace = conversations(tmp_path / "talks.jsonl", lambda talk, count: [1000 * talk + i for i in range(count)])
    flags = ["--trace", trace, "--instances", "2", "--pool-tokens", "100000"]
    cache = planned(capsys, *flags, "--cache-fraction", "1.0")["cache"]
    lengths = [512 * (4 + 2 * turn) for turn in range(4, 10)]
    expected = sum(length - 1024 for length in lengths) / sum(lengths)
    assert cache["hit_share"]["retained"] == cache["hit_share"]["one_pool"] == pytest.approx(expected, abs=1e-4)
    prefill = cache["prefill_s_mean"]
    assert prefill["retained"] < 0.2 * prefill["none"]
    little = planned(capsys, *flags, "--cache-fraction", "0.02")["cache"]
    assert little["hit_share"]["retained"] == 0, "2,000 tokens of a pool hold no turn"
    assert little["prefill_s_mean"]["retained"] == prefill["none"]
    assert run(*flags, "--cache-fraction", "1.0") == 0 and f"{100 * expected:.1f} % found" in capsys.readouterr().out
    assert "cache" not in planned(capsys, *flags)
    strangers = conversations(tmp_path / "strangers.jsonl", lambda talk, count: [100 * count + 50 * talk + i for i in range(count)])
    alone = planned(capsys, "--trace", strangers, *flags[2:], "--cache-fraction", "1.0")["cache"]
    assert alone["hit_share"] == {"retained": 0, "trees": 0, "one_pool": 0}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--cache-fraction", "0"], "outside (0, 1]"),
        (["--cache-fraction", "1.5"], "outside (0, 1]"),
        (["--cache-fraction", "0.5"], "does not tell which prompts begin alike"),
    ],
)
def test_a_cache_that_cannot_be_planned_says_why(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = trace_file(tmp_path / "t.csv", [(0, 1000, 10), (1, 2000, 10)])
    assert run("--trace", trace, "--instances", "2", "--pool-tokens", "100000", *flags) == 2
    assert message in capsys.readouterr().err


def test_a_pool_that_no_prompt_fits_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = conversations(tmp_path / "talks.jsonl", lambda talk, count: [1000 * talk + i for i in range(count)])
    assert run("--trace", trace, "--instances", "2", "--pool-tokens", "4000", "--cache-fraction", "1.0") == 2
    assert "none of 20 requests fits a pool of 4000 tokens" in capsys.readouterr().err
