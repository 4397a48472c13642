"""The tests' own tools: prompts that say what they claim, guards of the client, readers, and the end of a process tree."""

from __future__ import annotations

import gc
import itertools
import shlex
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import psutil
import pytest

from testing.captures import collector_off
from testing.client import Client, RequestFailed, checked_ids
from testing.demo import typed
from testing.disaggregation import decode_server, prefill_server
from testing.documentation import serve_lines
from testing.machine_lock import machine_lock
from testing.metrics import Sample, format_loads, parse_metrics
from testing.ports import PORT_OFFSETS, find_free_port, find_free_ports
from testing.processes import end_process_tree, kill_process_tree
from testing.recall import VOCABULARY_SIZE, depth_at, encode, recall_prompt
from testing.server import Server, ServerConfig, ServerStartError, clean_environment, server_environment, start_server


@pytest.mark.parametrize("position", [2, 100, 1023, 1024, 1025, 3400])
def test_a_key_starts_where_it_was_asked_for(position: int) -> None:
    prompt = recall_prompt(3500, depth_at(3500, position), seed=position)
    assert len(prompt.text) == len(prompt.ids) == 3500
    assert prompt.text[position : position + len(prompt.answer)] == prompt.answer
    assert prompt.text.count(prompt.answer) == 1


def test_the_demo_names_commands_that_run_where_it_was_started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A newcomer's shell knows neither the environment nor the free port that the demo took."""
    server = cast(Server, SimpleNamespace(port=18300))
    monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv" / "bin" / "python"))
    assert typed("top", server) == f"{tmp_path}/.venv/bin/sglang-dcp top --port 18300"
    monkeypatch.chdir(tmp_path)
    assert typed("requests abc", server) == ".venv/bin/sglang-dcp requests abc --port 18300"


def test_a_servers_processes_look_for_garbage_rarely_until_they_are_imported() -> None:
    environment = server_environment(ServerConfig("qwen3moe", environment=(("PYTHONPATH", "/of/the/test"),)))
    say = "print('/of/the/test' in sys.path, len(gc.callbacks), gc.get_threshold() == sitecustomize.DEFAULT)"
    code = f"import gc, sitecustomize, sys; {say}; kept = [[] for _ in range(1_100_000)]; {say}"
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines() == ["True 1 False", "True 0 True"]


def test_who_waits_for_the_machine_gets_it_or_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("testing.machine_lock.LOCK_FILE", tmp_path / "lock")
    came: list[str] = []

    def come() -> None:
        with machine_lock(wait_s=60):
            came.append("in")

    waiting = [threading.Thread(target=come) for _ in range(2)]
    with machine_lock():
        with pytest.raises(TimeoutError, match="held by another run"), machine_lock(wait_s=0.1):
            pass
        for thread in waiting:
            thread.start()
        assert came == []
    for thread in waiting:
        thread.join(timeout=60)
    assert came == ["in", "in"], "also behind one that gave up"


def test_a_key_cannot_start_in_the_question() -> None:
    with pytest.raises(ValueError, match="cannot start at token 3499"):
        depth_at(3500, 3499)


def test_scattered_keys_are_scattered() -> None:
    prompt = recall_prompt(3500, 0.1, seed=1, scatter=True)
    assert prompt.answer not in prompt.text
    assert all(character in prompt.text for character in prompt.answer)
    assert len(prompt.text) == 3500


def test_encoding_equals_the_tokenizer() -> None:
    from tokenizers import Tokenizer

    from testing.recall import model_path

    text = recall_prompt(400, 0.5, seed=3).text
    for name in ("qwen3moe", "deepseek_v2"):
        assert Tokenizer.from_file(f"{model_path(name)}/tokenizer.json").encode(text).ids == encode(text)


@pytest.mark.parametrize("ids", [[], [-1], [VOCABULARY_SIZE], [0, 10**6]])
def test_ids_that_would_kill_a_server_are_not_sent(ids: list[int]) -> None:
    with pytest.raises(ValueError, match="input_ids"):
        checked_ids(ids)
    with pytest.raises(ValueError, match="input_ids"):
        Client(port=1).generate(ids)


def test_empty_text_is_not_sent() -> None:
    with pytest.raises(ValueError, match="empty"):
        Client(port=1).generate("")


def test_metrics_are_parsed() -> None:
    text = '# HELP x\nsglang:dyncp_kv_tokens{dp_rank="2",model_name="a\\"b"} 17.0\nup 1\nbad line here x\n'
    assert parse_metrics(text) == [Sample("sglang:dyncp_kv_tokens", {"dp_rank": "2", "model_name": 'a\\"b'}, 17.0), Sample("up", {}, 1.0)]
    assert "no metrics" in format_loads([], 10)


def test_commands_of_stock_and_dyncp() -> None:
    stock = ServerConfig("deepseek_v2", 4, page_size=64, chunk_tokens=64).command(1)
    assert "--enable-dyncp" not in stock
    assert stock[stock.index("--page-size") + 1] == "1", "stock MLA on the CPU"
    assert "--disable-overlap-schedule" in stock
    assert stock[stock.index("--chunked-prefill-size") + 1] == "256", "SGLang's flag counts all instances"
    dyncp = ServerConfig("deepseek_v2", 4, page_size=64, dyncp=True, flags=("--x", "1")).command(1)
    assert dyncp[dyncp.index("--page-size") + 1] == "64"
    assert dyncp[-3:] == ["--enable-dyncp", "--x", "1"]


def test_environment_of_an_outer_run_does_not_leak() -> None:
    assert clean_environment({"SGLANG_PLUGINS": "x", "DYNCP_A": "y", "HOME": "/h"}) == {"HOME": "/h"}


def test_free_port_is_free() -> None:
    assert find_free_port() >= 15000


def test_a_port_counts_as_taken_while_its_server_listens_and_no_longer() -> None:
    """A connection that the server closed first lingers for a minute under the server's port."""
    nobody_else_s = 14_000, 14_600
    first = find_free_port(*nobody_else_s)
    with socket.create_server(("127.0.0.1", first)) as server, socket.create_connection(("127.0.0.1", first)) as client:
        assert find_free_port(*nobody_else_s) != first
        server.accept()[0].close()
        assert client.recv(1) == b""
    assert find_free_port(*nobody_else_s) == first


def test_free_ports_of_servers_that_start_together_are_far_apart() -> None:
    ports = sorted(find_free_ports(5))
    assert min(later - earlier for earlier, later in itertools.pairwise(ports)) > max(PORT_OFFSETS)
    with pytest.raises(RuntimeError, match="no 3 free ports between 15000 and 15500"):
        find_free_ports(3, 15000, 15500)


def test_a_server_that_ends_is_reported_with_its_log(tmp_path) -> None:
    config = ServerConfig("qwen3moe", flags=("--tp", "zero"))
    with pytest.raises(ServerStartError, match="ended with code 1[\\s\\S]*--tp"):
        start_server(config, log_folder=tmp_path, limit_s=60)


def test_the_whole_tree_ends_also_what_ignores_sigterm() -> None:
    child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); time.sleep(600)"
    parent = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {child!r}]); print(p.pid, flush=True); p.wait()"
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    child_pid = int(process.stdout.readline())
    assert process.stdout.readline().strip() == "ready"
    end_process_tree(process.pid, grace_s=1.0)
    process.wait(timeout=5)
    deadline = time.monotonic() + 5
    while psutil.pid_exists(child_pid) and psutil.Process(child_pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    end_process_tree(process.pid)


def test_a_killed_tree_ends_at_once_and_leaves_no_semaphore() -> None:
    """What ignores SIGTERM too; the resource tracker of Python is left alone until it has removed what the others made."""
    code = "import multiprocessing, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    code += "s = multiprocessing.get_context('spawn').Semaphore(1); print(s._semlock.name, flush=True); time.sleep(600)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    name = process.stdout.readline().strip().lstrip("/")
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    semaphore = Path("/dev/shm") / f"sem.{name}"
    assert len(family) == 2 and semaphore.exists()
    deadline = time.monotonic() + 60
    while not any("resource_tracker" in word for word in family[1].cmdline()):  # it starts
        assert time.monotonic() < deadline
        time.sleep(0.05)
    kill_process_tree(process.pid)
    process.wait(timeout=5)
    assert not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in family)
    assert not semaphore.exists()
    kill_process_tree(process.pid)


def test_error_events_of_a_stream_are_raised() -> None:
    from testing.client import Stream

    stream = Stream(connection=None, response=[b'data: {"error": {"code": 503, "message": "full"}}\n'])
    with pytest.raises(RequestFailed, match="HTTP 503: full"):
        list(stream.events())


NOT_ON_ONE_MACHINE = {"--host", "--disaggregation-bootstrap-port", "--moe-a2a-backend"}
"""Addresses, which a test server has of its own, and DeepEP, which needs GPUs (benchmark/multi_gpu)."""


def test_lines_that_need_other_servers_have_the_flags_of_test_servers() -> None:
    """The documentation's lines for several hosts and for prefill and decode; all others are started as they are written."""
    tested = {
        "--nnodes": ServerConfig("qwen3moe", 4, dyncp=True, nodes=2).command(port=20000, node=1),
        "prefill": replace(prefill_server("qwen3moe"), instances=2).command(port=20000),
        "decode": decode_server("qwen3moe", 2, 512).command(port=20000),
    }
    found = set()
    for words in map(shlex.split, serve_lines()):
        for kind in (kind for kind in tested if kind in words):
            found.add(kind)
            assert {word for word in words if word.startswith("--")} <= set(tested[kind]) | NOT_ON_ONE_MACHINE, words
    assert found == set(tested)


class Knot:
    """Garbage that reference counts leave, as a test's graphs are."""

    def __init__(self, destroyed: list[str], name: str) -> None:
        self.destroyed, self.name, self.itself = destroyed, name, self

    def __del__(self) -> None:
        self.destroyed.append(self.name)


def test_nothing_is_destroyed_while_a_graph_is_captured() -> None:
    destroyed: list[str] = []
    Knot(destroyed, "before")
    with pytest.raises(ZeroDivisionError), collector_off():
        assert destroyed == ["before"] and not gc.isenabled()
        Knot(destroyed, "inside")
        _ = [[] for _ in range(200_000)]  # many times as many as make the collector run
        assert destroyed == ["before"]
        1 / 0  # noqa: B018
    assert gc.isenabled()
    gc.disable()
    try:
        with collector_off():
            pass
        assert not gc.isenabled(), "it was off before"
    finally:
        gc.enable()
