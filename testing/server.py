"""Starts real SGLang servers for tests: one at a time on this machine, shared by all tests that ask for the same configuration."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from testing.client import Client
from testing.forked import ForkedProcess, ForkHosts, python_path, while_importing
from testing.machine_lock import machine_lock, record
from testing.ports import FOLLOWER_OFFSET, RENDEZVOUS_OFFSET, find_free_port
from testing.processes import end_process_tree, kill_process_tree
from testing.recall import model_path

START_LIMIT_S = 480.0
"""A process of SGLang imports for 20 s of CPU time, and four instances are seven processes: 70 s on two idle cores, more on busy ones."""
FOLLOWER_LIMIT_S = 120.0
"""Until a further node has read its arguments."""
STARTUP_FOLDER = Path(__file__).parent / "startup"
LONGEST_LINE = 400
"""A server prints its arguments in one line of thousands of characters."""
EXCEPTION = "Scheduler hit an exception"
TRACEBACK = "Traceback (most recent call last)"

Process = subprocess.Popen[bytes] | ForkedProcess


class ServerStartError(RuntimeError):
    """The server ended or stayed unhealthy; the message ends with the last lines of its log."""


@dataclass(frozen=True)
class ServerConfig:
    """What a test asks for. Equal configurations share one server.

    model: a name of testing.recall.MODEL_NAMES. pool_tokens: KV pool of each instance. chunk_tokens: most prefill tokens of one instance in
    one step (SGLang's flag counts all instances). flags: further flags, as they stand on the command line. nodes: process trees that share
    the instances, as on so many hosts. slices: processes of an instance (attention tensor parallelism). preloaded: whether its processes
    are forked from one that has imported SGLang (startup/forking.py). dyncp=False is *stock*: the hook sets `flags` and `cpu`
    alone.
    """

    model: str
    instances: int = 1
    pool_tokens: int = 8192
    page_size: int = 16
    chunk_tokens: int | None = None
    dyncp: bool = False
    flags: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = field(default=())
    nodes: int = 1
    slices: int = 1
    preloaded: bool = False

    def command(self, port: int, node: int = 0) -> list[str]:
        """`sglang-dcp serve ...` of one node. Stock MLA on the CPU runs with page size 1 and without the overlap schedule only."""
        own_port = port if node == 0 else port + FOLLOWER_OFFSET + node - 1
        command = [
            sys.executable,
            "-m",
            "sglang_dcp.cli.commands",
            "serve",
            "--model-path",
            model_path(self.model),
            "--port",
            str(own_port),
        ]
        if self.nodes > 1:
            command += ["--nnodes", str(self.nodes), "--node-rank", str(node), "--dist-init-addr", f"127.0.0.1:{port + RENDEZVOUS_OFFSET}"]
        # Without it SGLang would serve float32 weights in half precision.
        command += ["--dtype", "float32", "--context-length", "4096", "--max-total-tokens", str(self.pool_tokens), "--skip-server-warmup"]
        stock_mla = self.model == "deepseek_v2" and not self.dyncp
        command += ["--page-size", str(1 if stock_mla else self.page_size)]
        if stock_mla:
            command.append("--disable-overlap-schedule")
        if self.chunk_tokens is not None:
            command += ["--chunked-prefill-size", str(self.chunk_tokens * self.instances)]
        if self.instances > 1:
            ranks = str(self.instances * self.slices)
            command += ["--tp", ranks, "--attn-dp-size", str(self.instances), "--ep", ranks]
        if self.dyncp:
            command.append("--enable-dyncp")
        return command + list(self.flags)


@dataclass
class Server:
    """A running server. `client` talks to it; `log` is its output so far. followers: the process trees of the other nodes."""

    config: ServerConfig
    process: Process
    port: int
    log_path: Path
    start_s: float = 0.0
    followers: list[Process] = field(default_factory=list)

    @property
    def client(self) -> Client:
        return Client(self.port)

    @property
    def is_alive(self) -> bool:
        return self.process.poll() is None

    @property
    def has_failed(self) -> bool:
        """Whether it ended by itself, or is about to: it answers 503 to those who still ask, for a while."""
        return not self.is_alive or EXCEPTION in self.log()

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def last_words(self, most_lines: int = 120) -> str:
        """What a server that died has to say: its log from a scheduler's exception on, else its end, from the first traceback there on."""
        lines = [line[:LONGEST_LINE] for line in self.log().splitlines()]
        end = max(0, len(lines) - 5 * most_lines)
        marks = [i for i, line in enumerate(lines) if EXCEPTION in line] or [i for i in range(end, len(lines)) if TRACEBACK in lines[i]]
        first = marks[0] if marks else max(0, len(lines) - most_lines)
        return f"--- {self.log_path}, code {self.process.poll()}\n" + "\n".join(lines[first:][:most_lines])

    def stop(self) -> None:
        """Ends the server with its whole process tree, as an operator would. Can be repeated."""
        end_process_tree(self.process.pid)
        self.process.wait(timeout=10)
        for follower in self.followers:
            kill_process_tree(follower.pid)
            follower.wait(timeout=10)

    def kill(self) -> None:
        """The same without asking it first, which would take seconds. Can be repeated."""
        for process in (self.process, *self.followers):
            kill_process_tree(process.pid)
            process.wait(timeout=10)


def start_server(
    config: ServerConfig,
    log_folder: Path,
    limit_s: float = START_LIMIT_S,
    started: Callable[[Server], None] | None = None,
    port: int = 0,
    hosts: ForkHosts | None = None,
) -> Server:
    """Starts a server and waits until it is healthy. ServerStartError if it ends or is not healthy within `limit_s`.

    started: called with the server once its process exists, so that a run that is killed meanwhile leaves a record. port: 0 for a free one.
    hosts: fork the processes of a server that is to be preloaded.
    """
    port = port or find_free_port()
    log_folder.mkdir(parents=True, exist_ok=True)
    log_path = log_folder / f"server_{port}_{int(time.time())}.log"
    began = time.monotonic()
    followers = [_start_follower(config, port, node, log_path.with_suffix(f".node{node}.log"), hosts) for node in range(1, config.nodes)]
    server = Server(config, _start_node(config, port, 0, log_path, hosts), port, log_path, followers=followers)
    try:
        if started is not None:
            started(server)
        _wait_healthy(server, limit_s)
    except BaseException:
        server.kill()
        raise
    server.start_s = time.monotonic() - began
    return server


def _start_node(config: ServerConfig, port: int, node: int, log_path: Path, hosts: ForkHosts | None) -> Process:
    environment, command = server_environment(config), config.command(port, node)
    with log_path.open("wb") as log:
        log.write((" ".join(command) + "\n").encode())
        log.flush()
        if config.preloaded:
            if hosts is None:
                raise ValueError("a server whose processes are preloaded is started by a ServerPool")
            return hosts.of(while_importing(environment, command, STARTUP_FOLDER)).fork(command, environment, log)
        return subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment, start_new_session=True
        )


def _start_follower(config: ServerConfig, port: int, node: int, log_path: Path, hosts: ForkHosts | None) -> Process:
    """Started ahead of the first node, past its look at the ports: on one machine it would find those that the first one has taken."""
    process, deadline = _start_node(config, port, node, log_path, hosts), time.monotonic() + FOLLOWER_LIMIT_S
    while "server_args=" not in log_path.read_text(errors="replace"):
        if process.poll() is not None or time.monotonic() > deadline:
            kill_process_tree(process.pid)
            raise ServerStartError(f"node {node} did not begin, code {process.poll()}\n{log_path.read_text(errors='replace')[-4000:]}")
        time.sleep(0.1)
    return process


def _wait_healthy(server: Server, limit_s: float) -> None:
    deadline = time.monotonic() + limit_s
    probe = Client(server.port, timeout_s=5.0)
    while not probe.is_healthy():
        if not server.is_alive:
            raise ServerStartError(f"server ended with code {server.process.returncode} before it was healthy\n{_last_lines(server)}")
        if time.monotonic() > deadline:
            raise ServerStartError(f"server not healthy after {limit_s:.0f} s\n{_last_lines(server)}")
        time.sleep(0.25)


def _last_lines(server: Server, count: int = 40) -> str:
    return f"--- {server.log_path}\n" + "\n".join(server.log().splitlines()[-count:])


def clean_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without what an outer run may have set for SGLang: a test decides that by its configuration alone."""
    ours = ("SGLANG_", "DYNCP_")
    return {name: value for name, value in environment.items() if not name.startswith(ours)}


def server_environment(config: ServerConfig) -> dict[str, str]:
    """That of the server's processes."""
    environment = clean_environment(os.environ) | dict(config.environment)
    return environment | {"PYTHONPATH": python_path(STARTUP_FOLDER, environment)}


class ServerPool:
    """At most one live server. `get` returns it if it has the wanted configuration, else stops it and starts the wanted one."""

    def __init__(self, lock: IO[str], log_folder: Path) -> None:
        self._lock = lock
        self.log_folder = log_folder
        self._hosts = ForkHosts(log_folder)
        self._current: Server | None = None

    def get(self, config: ServerConfig) -> Server:
        if self._current is not None and not self._current.has_failed and self._current.config == config:
            return self._current
        self.stop(at_once=True)
        self._current = self.start(config, started=lambda server: record(self._lock, server.process.pid))
        return self._current

    def start(self, config: ServerConfig, *, started: Callable[[Server], None] | None = None, port: int = 0) -> Server:
        """A server that the caller ends, beside those that are there."""
        return start_server(config, log_folder=self.log_folder, started=started, port=port, hosts=self._hosts)

    def failed_server(self) -> Server | None:
        """The server that tests use, if it ended by itself or is about to."""
        return self._current if self._current is not None and self._current.has_failed else None

    def stop(self, *, at_once: bool = False) -> None:
        """at_once: without the server's own way to end, for it has nothing to keep."""
        if self._current is not None:
            if at_once:
                self._current.kill()
            else:
                self._current.stop()
            self._current = None
            record(self._lock, None)

    def close(self) -> None:
        self.stop()
        self._hosts.close()


@contextmanager
def server_pool(log_folder: Path) -> Iterator[ServerPool]:
    """A pool under the machine lock; whatever it started is stopped at the end."""
    with machine_lock() as lock:
        pool = ServerPool(lock, log_folder)
        try:
            yield pool
        finally:
            pool.close()


@contextmanager
def running_server(config: ServerConfig, log_folder: Path | None = None) -> Iterator[Server]:
    """One server for a script."""
    with server_pool(log_folder or Path("logs")) as pool:
        yield pool.get(config)
