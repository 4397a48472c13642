"""Own traces: CSV and Parquet, bad rows by line, the command's result file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmark.simulate.__main__ import main
from benchmark.simulate.traces import read_trace
from benchmark.simulate.workloads import chat


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
    left, right = read_trace(csv), read_trace(tmp_path / "a.parquet")
    assert left.requests(1.0, 9.0, 1) == right.requests(1.0, 9.0, 1)
    assert left.max_prompt == 30 and left.max_new_tokens == 7


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("arrival,input,output\n0,10,5\n1,ten,5\n", "line 3.*ten"),
        ("arrival,input,output\n0,10,5\n1,10,0\n", "line 3.*output >= 1"),
        ("arrival,input,output\n0,10,5\nnan,10,5\n", "line 3"),
        ("arrival,input,output\n0,10,5\n1,10\n", "line 3"),
        ("when,input,output\n0,10,5\n", "no column for arrival"),
        ("arrival,input,output\n0,10,5\n", "at least two"),
        ("arrival,input,output\n3,10,5\n3,10,5\n", "no clock"),
    ],
)
def test_bad_rows_are_reported_with_their_line(tmp_path: Path, text: str, message: str):
    with pytest.raises(ValueError, match=message):
        read_trace(write(tmp_path / "bad.csv", text))


def test_the_rate_and_the_seed_shape_a_stretched_trace(tmp_path: Path):
    rows = "".join(f"{i * i % 97 + i},{i + 1},{i % 7 + 1}\n" for i in range(100))
    workload = read_trace(write(tmp_path / "t.csv", "arrival,input,output\n" + rows))
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
    assert main(["--trace", str(tmp_path / "none.csv"), "--out", str(tmp_path)]) == 2
    assert "no such file" in capsys.readouterr().err
    assert main([*common, "--model", "kimi-k2", "--gpu", "h100"]) == 2
    assert "leave no KV pool" in capsys.readouterr().err
