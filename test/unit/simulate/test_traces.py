"""A trace as a workload: CSV and Parquet, ticks, the command's result file. The formats: test/unit/traces."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmark.simulate.__main__ import main
from benchmark.simulate.traces import load_trace
from benchmark.simulate.workloads import chat

DATA = Path(__file__).resolve().parents[2] / "data" / "traces"


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_csv_and_parquet_give_the_same_workload(tmp_path: Path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")

    csv = write(tmp_path / "a.csv", "arrival,input,output\n0,10,5\n2,20,6\n1,30,7\n")
    parquet.write_table(
        pyarrow.table({"timestamp_ms": [0, 2000, 1000], "input_length": [10, 20, 30], "output_length": [5, 6, 7]}), tmp_path / "a.parquet"
    )
    left, right = load_trace(csv)[1], load_trace(tmp_path / "a.parquet")[1]
    assert left.requests(1.0, 9.0, 1) == right.requests(1.0, 9.0, 1)
    assert left.max_prompt == 30 and left.max_new_tokens == 7


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("arrival,input,output\n0,10,5\n1,ten,5\n", "line 3: input is not a number"),
        ("arrival,input,output\n0,10,5\n1,10,0\n", "line 3: output is 0"),
        ("arrival,input,output\n0,10,5\nnan,10,5\n", "line 3"),
        ("arrival,input,output\n0,10,5\n1,10\n", "line 3"),
        ("when,input,output\n0,10,5\n", "no known trace has the fields when"),
        ("arrival,input,output\n0,10,5\n", "at least 2 usable requests"),
        ("arrival,input,output\n3,10,5\n3,10,5\n", "one time; the trace has no clock"),
    ],
)
def test_strict_refuses_a_bad_row_by_its_line(tmp_path: Path, text: str, message: str):
    with pytest.raises(ValueError, match=message):
        load_trace(write(tmp_path / "bad.csv", text), strict=True)


def test_the_rate_and_the_seed_shape_a_stretched_trace(tmp_path: Path):
    rows = "".join(f"{i * i % 97 + i},{i + 1},{i % 7 + 1}\n" for i in range(100))
    _, workload = load_trace(write(tmp_path / "t.csv", "arrival,input,output\n" + rows))
    requests = workload.requests(4.0, 100.0, 1)
    assert len(requests) == 400
    assert requests == sorted(requests, key=lambda row: row[0])
    assert requests[-1][0] == pytest.approx(100, rel=0.1)
    assert workload.requests(4.0, 100.0, 2) != requests


def test_chat_draws_the_same_requests_at_every_rate():
    slow, fast = chat(0.01).requests(5.0, 100.0, 1), chat(0.01).requests(10.0, 100.0, 1)
    assert [row[1:] for row in slow] == [row[1:] for row in fast[:500]]
    assert sum(row[1] > 8192 for row in chat(0.05).requests(100.0, 100.0, 1)) == pytest.approx(500, rel=0.2)
    assert max(row[1] for row in chat(0.0).requests(100.0, 100.0, 1)) <= 8192


def test_the_command_writes_its_result(tmp_path: Path, capsys):
    rows = "".join(f"{0.2 * i},{50_000 if i % 40 == 7 else 600},{20 + i % 9}\n" for i in range(200))
    trace = write(tmp_path / "mine.csv", "arrival,input,output\n" + rows)
    common = ["--trace", str(trace), "--instances", "8", "--seconds", "8", "--slo-ms", "60", "--no-plots", "--out", str(tmp_path / "out")]
    assert main([*common, "--policy", "dual-balance", "--policy", "local-least-kv"]) == 0
    report = json.loads((tmp_path / "out" / "result.json").read_text(encoding="utf-8"))
    assert set(report["policies"]) == {"dual-balance", "local-least-kv"}
    wanted = {"max_rate", "p50_tpot_ms", "p99_tpot_ms", "kv_balance", "batch_balance", "retractions"}
    assert all(wanted <= set(row) for row in report["policies"].values())
    assert report["trace"] == {"format": "table", "requests": 200, "skipped": 0, "tick_s": 0.0}
    assert "mine: table, 200 requests, 5 requests/s" in capsys.readouterr().out
    assert main(["--trace", str(tmp_path / "none.csv"), "--out", str(tmp_path)]) == 2
    assert "no such file" in capsys.readouterr().err
    assert main([*common, "--model", "kimi-k2", "--gpu", "h100"]) == 2
    assert "leave no KV pool" in capsys.readouterr().err


def test_requests_of_a_tick_are_spread_over_it():
    trace, workload = load_trace(DATA / "mooncake.jsonl")
    assert trace.tick_s == 3.0 and workload.max_prompt == 90_000
    rate = len(trace.requests) / trace.span_s
    drawn = workload.requests(rate, 4 / rate, 1)
    assert len({row[0] for row in drawn}) == 4, "two of them share a tick in the file"


def test_bad_rows_are_named_by_the_command_and_strict_refuses_them(tmp_path: Path, capsys):
    common = ["--trace", str(DATA / "azure_2023.csv"), "--instances", "8", "--seconds", "2", "--rate", "2", "--no-plots"]
    common += ["--policy", "dual-balance", "--out", str(tmp_path / "out")]
    assert main([*common, "--strict"]) == 2
    assert "line 5: ContextTokens is negative" in capsys.readouterr().err
    assert main(common) == 0
    assert "skipped 1 of 4 rows: ContextTokens is negative (line 5)" in capsys.readouterr().out
