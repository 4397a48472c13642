"""Every published format is detected and read; what cannot be used is named by line and reason, and hostile files end in clear errors."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from sglang_dcp.observe.placement_log import PlacementLog
from sglang_dcp.policy.types import InstanceLoad, Placement, PlacementRequest
from sglang_dcp.traces.reader import FORMAT_NAMES, read_trace

DATA = Path(__file__).resolve().parents[2] / "data" / "traces"

# file, format, requests (arrival from the first one on, prompt, output), skipped rows by place and a word of the reason
CASES = [
    ("mooncake.jsonl", "mooncake", [(0, 700, 12), (0, 5000, 40), (3, 90000, 300), (5.999, 820, 9)], {"line 4": "output_length is 0"}),
    ("azure_2023.csv", "azure", [(0, 374, 44), (0.75, 4000, 1), (1.5, 396, 109)], {"line 5": "ContextTokens is negative"}),
    ("azure_2024.csv", "azure", [(0, 2162, 5), (1.007405, 2399, 6), (3, 76, 15)], {}),
    ("burstgpt.csv", "burstgpt", [(0, 472, 18), (40, 1087, 230), (113, 417, 276)], {"line 4": "a failed request"}),
    ("servegen.jsonl", "servegen", [(0, 120, 30), (1.25, 64000, 700)], {"line 3": "data.output_tokens is missing"}),
    ("table.csv", "table", [(0, 600, 20), (0.5, 250000, 30), (1, 700, 10)], {"line 5": "arrival is not a number"}),
    ("placement_log.jsonl", "placement-log", [(0, 300, 64), (0.5, 1500, 8)], {"line 5": "not an entry"}),
]


@pytest.mark.parametrize(("name", "format_name", "requests", "skipped"), CASES, ids=[case[0] for case in CASES])
def test_a_published_format_is_detected_and_read(name: str, format_name: str, requests: list[tuple], skipped: dict[str, str]) -> None:
    trace = read_trace(DATA / name)
    assert trace.format == format_name
    assert [item[1:3] for item in trace.requests] == [item[1:] for item in requests]
    assert [item.arrival_s for item in trace.requests] == pytest.approx([item[0] for item in requests], abs=1e-5)
    assert [row.where for row in trace.skipped] == list(skipped)
    for row in trace.skipped:
        assert skipped[row.where] in row.reason
        assert any(row.where in line and skipped[row.where] in line for line in trace.describe())
    assert read_trace(DATA / name, format_name) == trace
    if skipped:
        with pytest.raises(ValueError, match=f"{next(iter(skipped))}: .*--strict"):
            read_trace(DATA / name, strict=True)


def test_blocks_of_prompts_are_kept_where_a_file_has_them(tmp_path: Path) -> None:
    assert read_trace(DATA / "mooncake.jsonl").block_tokens == 512 and read_trace(DATA / "azure_2023.csv").block_tokens == 0
    row = {"timestamp": 0, "input_length": 700, "output_length": 5}
    rows = [row | {"hash_ids": ids} for ids in ([7, 9], None, "7", [True], [0.5])]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    trace = read_trace(tmp_path / "t.jsonl")
    assert sorted(item.blocks for item in trace.requests) == [(), (7, 9)]
    assert [item.where for item in trace.skipped] == ["line 3", "line 4", "line 5"]
    assert all("hash_ids is not a list of whole numbers" in item.reason for item in trace.skipped)


def test_bench_serving_output_has_lengths_and_no_clock() -> None:
    trace = read_trace(DATA / "bench_serving.jsonl")
    assert trace.format == "bench_serving"
    assert [item[1:3] for item in trace.requests] == [(100, 10), (200, 20), (400, 40), (50, 5), (60, 6)]
    arrivals = [item.arrival_s for item in trace.requests]
    assert arrivals == sorted(arrivals) and arrivals[0] == 0 and trace.requests == read_trace(DATA / "bench_serving.jsonl").requests
    assert [row.where for row in trace.skipped] == ["line 1, request 3", "line 3"]
    assert "--output-details" in trace.skipped[1].reason
    assert any("no arrival times" in line and "4 requests/s" in line for line in trace.describe())
    assert any("no arrival times" in line and "line 2" in line for line in trace.describe())


def test_a_log_as_the_router_writes_it(tmp_path: Path) -> None:
    log = PlacementLog(tmp_path / "log.jsonl")
    log.begin(policy="dual-balance", num_instances=1)
    log.add(100.0, "a", PlacementRequest(33, 16, 16), [InstanceLoad(0, 0, 0, 1024)], Placement(0, (0,), (33,)))
    log.add_finish(101.0, "a")
    trace = read_trace(log.path)
    assert (trace.format, trace.requests) == ("placement-log", ((0.0, 33, 16, ()),)) and not trace.skipped
    assert any("max_new_tokens is taken" in line for line in trace.describe())


def test_ticks_are_known_for_what_they_are(tmp_path: Path) -> None:
    trace = read_trace(DATA / "mooncake.jsonl")
    assert trace.tick_s == 3.0 and any("ticks of 3 s" in line for line in trace.describe())
    fine = tmp_path / "fine.jsonl"
    rows = [{"timestamp": moment, "input_length": 5, "output_length": 5, "hash_ids": []} for moment in (0, 0, 40, 277, 471)]
    fine.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_trace(fine).tick_s == 0.0, "a burst on a fine clock is a burst"


@pytest.mark.parametrize("name", [case[0] for case in CASES] + ["bench_serving.jsonl"])
def test_marks_line_ends_and_compression_change_nothing(tmp_path: Path, name: str) -> None:
    plain = (DATA / name).read_bytes().replace(b"\r\n", b"\n")
    trace = read_trace(DATA / name)
    variants = {"mark": b"\xef\xbb\xbf" + plain, "crlf": plain.replace(b"\n", b"\r\n"), "blank": b"\n\n" + plain, "no end": plain.rstrip()}
    for label, data in variants.items():
        path = tmp_path / name
        path.write_bytes(data)
        assert read_trace(path).requests == trace.requests, label
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(plain))
    packed = read_trace(tmp_path / f"{name}.gz")
    assert (packed.name, packed.requests) == (trace.name, trace.requests)


def write(tmp_path: Path, text: str, name: str = "t.csv") -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


HEADER = "arrival,input,output\n"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("1,ten,5", "input is not a number"),
        ("1,nan,5", "input is not a number"),
        ("inf,10,5", "arrival is not a number"),
        ("1,10,1e400", "output is not a number"),
        ("1,-3,5", "input is negative"),
        ("1,10,0", "output is 0"),
        ("1,10.5,5", "input is not a whole number"),
        ("1,1_000,5", "input is not a number"),
        ("1," + "9" * 60 + ",5", "input is beyond"),
        ("1e300,10,5", "arrival is beyond"),
        ("1" * 399 + ",10,5", "arrival is beyond"),
        ("1,,5", "input is missing"),
        ("1,10", "2 values for 3 columns"),
        ("1,10,5,9", "4 values for 3 columns"),
        ("arrival,input,output", "arrival is not a number"),
        ('{"timestamp": 3}', "1 values for 3 columns"),
    ],
)
def test_a_bad_row_does_not_refuse_the_file(tmp_path: Path, row: str, reason: str) -> None:
    path = write(tmp_path, f"{HEADER}0,10,5\n{row}\n2,20,6\n")
    trace = read_trace(path)
    assert [item[:3] for item in trace.requests] == [(0, 10, 5), (2, 20, 6)]
    assert [(skipped.where, reason in skipped.reason) for skipped in trace.skipped] == [("line 3", True)]
    with pytest.raises(ValueError, match="line 3"):
        read_trace(path, strict=True)


@pytest.mark.parametrize(
    "line", ["{", "[1]", "7", '{"timestamp": true, "input_length": 1, "output_length": 1}', '{"completed": 1}', "[" * 5000]
)
def test_a_bad_json_line_does_not_refuse_the_file(tmp_path: Path, line: str) -> None:
    good = '{"timestamp": 0, "input_length": 5, "output_length": 5, "hash_ids": []}\n'
    trace = read_trace(write(tmp_path, f"{good}{line}\n{good}", "t.jsonl"))
    assert len(trace.requests) == 2 and [row.where for row in trace.skipped] == ["line 2"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file is empty"),
        ("\n \n", "the file is empty"),
        (HEADER, "at least 1 usable requests, this has 0"),
        (f"{HEADER}1,-1,-1\n", "line 2: input is negative"),
        ("when,input,output\n0,10,5\n", "no known trace has the fields when, input, output"),
        ("arrival,input,input,output\n0,1,2,3\n", "'input' stands more than once"),
        ("[1, 2", "not a JSON array"),
        ('{"backend": "x", "dataset_name": "y", "request_rate": 1, "duration": 1, "completed": 1}', "--output-details"),
    ],
)
def test_a_file_without_a_trace_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read_trace(write(tmp_path, text))
    assert "t.csv" in str(caught.value)


def test_what_is_no_text_or_not_there_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(ValueError, match=r"t\.csv: not UTF-8"):
        read_trace(tmp_path / "t.csv")
    (tmp_path / "cut.csv.gz").write_bytes(gzip.compress(b"arrival,input,output\n" + b"0,10,5\n" * 9000)[:60])
    with pytest.raises((ValueError, OSError, EOFError)):
        read_trace(tmp_path / "cut.csv.gz")
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_trace(tmp_path)


def test_the_format_can_be_named(tmp_path: Path) -> None:
    path = write(tmp_path, "timestamp,input_length,output_length\n0,10,5\n2000,20,6\n")
    assert [item.arrival_s for item in read_trace(path).requests] == [0, 2000], "a table counts seconds, as ever"
    assert [item.arrival_s for item in read_trace(path, "mooncake").requests] == [0, 2]
    with pytest.raises(ValueError, match="no column for arrival; azure has TIMESTAMP"):
        read_trace(path, "azure")
    with pytest.raises(ValueError, match="expected one of") as caught:
        read_trace(path, "zip")
    assert all(name in str(caught.value) for name in FORMAT_NAMES)


def test_a_column_that_is_not_read_may_stand_twice(tmp_path: Path) -> None:
    assert len(read_trace(write(tmp_path, "arrival,note,note,input,output\n0,a,b,10,5\n")).requests) == 1


def test_dates_of_a_table_may_have_a_zone(tmp_path: Path) -> None:
    rows = "2024-05-10T10:00:00+02:00,10,5\n2024-05-10T08:00:01Z,20,6\n2024-05-10 08:00:02.5,30,7\n"
    trace = read_trace(write(tmp_path, HEADER + rows))
    assert [item[:3] for item in trace.requests] == [(0, 10, 5), (1, 20, 6), (2.5, 30, 7)]


def test_a_json_array_is_read_like_its_lines(tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (DATA / "servegen.jsonl").read_text().splitlines()]
    trace = read_trace(write(tmp_path, json.dumps(rows), "servegen.json"))
    assert trace.requests == read_trace(DATA / "servegen.jsonl").requests and trace.skipped[0].where == "entry 3"
