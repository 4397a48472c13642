"""The report of requests: what is kept, how it is merged, fetched and shown."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from sglang_dcp.cli import commands as cli
from sglang_dcp.observe.report_client import ReportClient, ReportError
from sglang_dcp.observe.request_log import KEPT, LONGEST_ID, RequestLog, merge_requests, short_id
from sglang_dcp.observe.tables import balance, format_instances, format_requests, printable


def entry(rid: str, time: float = 0.0, **changes: Any) -> dict[str, Any]:
    shards = [{"rank": 1, "tokens": 1008}, {"rank": 0, "tokens": 500}]
    where = {"home": 0, "shards": shards, "degree_start": 1, "degree_end": 2}
    return {"rid": rid, "state": "finished", "prompt_tokens": 1500, "output_tokens": 9, "time": time, **where} | changes


def instance(rank: int, kv_tokens: int, home_requests: int = 0) -> dict[str, Any]:
    return {"rank": rank, "pool_tokens": 1024, "kv_tokens": kv_tokens, "guest_tokens": 16, "home_requests": home_requests, "queued": 0}


def test_instances_of_several_nodes_name_theirs() -> None:
    text = format_instances([instance(0, 0) | {"node": 0}, instance(9, 0) | {"node": 1}])
    assert "0 (node 0)" in text and "9 (node 1)" in text and "node" not in format_instances([instance(0, 0), instance(1, 0)])


def test_log_keeps_the_last() -> None:
    log = RequestLog(kept=3)
    for number in range(5):
        log.add(entry(str(number)))
    assert [kept["rid"] for kept in log] == ["2", "3", "4"]
    assert len(log) == 3


def test_merge_puts_live_requests_first_and_the_newest_next() -> None:
    first = {"running": [entry("live", state="running")], "finished": [entry("old", 1.0), entry("new", 3.0)]}
    second = {"running": [], "finished": [entry("middle", 2.0)]}
    assert [item["rid"] for item in merge_requests([first, second])] == ["live", "new", "middle", "old"]
    assert [item["rid"] for item in merge_requests([first, second], "middle")] == ["middle"]
    assert merge_requests([first, second], "mid") == []


def test_merge_finds_the_parts_of_a_batch() -> None:
    report = {"running": [], "finished": [entry("a_0"), entry("a_1"), entry("ab")]}
    assert [item["rid"] for item in merge_requests([report], "a")] == ["a_0", "a_1"]


def test_long_ids_are_cut_and_found() -> None:
    long = "x" * 100_000
    assert short_id("abc") == "abc"
    assert len(short_id(long)) == LONGEST_ID
    report = {"running": [], "finished": [entry(short_id(long)), entry("a")]}
    assert [item["rid"] for item in merge_requests([report], long)] == [short_id(long)]


def test_merge_shows_at_most_the_kept() -> None:
    reports = [{"running": [], "finished": [entry(f"{rank}-{n}", float(n)) for n in range(KEPT)]} for rank in range(2)]
    merged = merge_requests(reports)
    assert len(merged) == KEPT
    assert merged[-1]["time"] == KEPT // 2


def test_tables() -> None:
    text = format_requests([entry("abc"), entry("d", degree_start=2)])
    assert "1 -> 2" in text
    assert "1:1008 0:500" in text
    assert "1,500" in text
    loads = format_instances([instance(0, 900, 3), instance(1, 100, 1)])
    assert "88 %" in loads
    assert "KV tokens 1.80, home requests 1.50" in loads
    assert balance([0, 0]) is None
    assert "KV tokens -, home requests -" in format_instances([instance(0, 0), instance(1, 0)])


@pytest.fixture
def server() -> Iterator[tuple[int, list[str]]]:
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            requests = [] if "rid=gone" in self.path else [entry("abc")]
            load = {"degrees": {"2": 1}, "longest": [entry("longest")]}
            body = json.dumps({"instances": [instance(0, 10, 1)], "requests": requests} | load).encode()
            self.send_response(404 if "rid=stock" in self.path else 200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_arguments: Any) -> None:
            return

    http_server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http_server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    yield http_server.server_port, asked
    http_server.shutdown()
    http_server.server_close()


def test_requests_command(server: tuple[int, list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    port, asked = server
    assert cli.main(["requests", "a b/c", "--port", str(port)]) == 0
    assert asked == ["/dyncp/requests?rid=a+b%2Fc"]
    assert "1 -> 2" in capsys.readouterr().out
    assert cli.main(["requests", "--json", "--url", f"http://127.0.0.1:{port}/"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["degree_end"] == 2


def test_unknown_id_is_an_error(server: tuple[int, list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["requests", "gone", "--port", str(server[0])]) == 1
    assert "'gone' is not among the last 1000" in capsys.readouterr().err


def test_top_command(server: tuple[int, list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    port, asked = server
    assert cli.main(["top", "--once", "--port", str(port)]) == 0
    plain = capsys.readouterr().out
    assert "KV tokens" in plain
    assert "longest" in plain
    assert "\x1b" not in plain, "no terminal"
    assert asked == ["/dyncp/load"]
    assert cli.main(["top", "--once", "--last", "0", "--port", str(port)]) == 0
    assert "longest" not in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["top", "--once", "--last", "21", "--port", str(port)])


def test_top_on_a_terminal(server: tuple[int, list[str]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert cli.main(["top", "--once", "--port", str(server[0])]) == 0
    drawn = capsys.readouterr().out
    assert "█" in drawn
    assert "1 -> 2" in drawn


def test_a_clients_text_gives_a_terminal_no_orders() -> None:
    hostile = "\x1b[2Jx\ny\u202ez\x9b1m"
    assert printable(hostile) == "?[2Jx?y?z?1m"
    assert "\x1b" not in format_requests([entry(hostile)])


def test_a_stock_server_and_none_at_all(server: tuple[int, list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ReportError, match="404.*--enable-dyncp"):
        ReportClient(f"http://127.0.0.1:{server[0]}").read("stock")
    assert cli.main(["top", "--once", "--url", "http://127.0.0.1:1"]) == 1
    assert "--port, --url" in capsys.readouterr().err
