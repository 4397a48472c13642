"""Servers that several parts of the report use: started ahead while another part measures, kept, and stopped at the end."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from benchmark.multi_gpu.open_arrivals import PLACEMENTS
from benchmark.multi_gpu.servers import (
    START_LIMIT_S,
    WITHOUT_PREFILL,
    GpuServer,
    ServerRefused,
    layered_server,
    stop_all,
    wait_ready,
)
from benchmark.multi_gpu.settings import ROOT, Settings
from sglang_dcp.observe.placement_log import LOG_VARIABLE
from testing.gpu import random_models
from testing.gpu.answers import pinned, prompt, step_counts
from testing.gpu.runtime_cases import SIZES
from testing.gpu.servers import port_range
from testing.machine_lock import machine_lock
from testing.ports import find_free_port

STOCK, SYNTHETIC, DYNCP = "stock", "dyncp_synthetic", "dyncp"
"""The servers with real layers: stock data parallelism; ours without prefill, for (d) and (e1); ours as users start it, for (e2)."""
LONG_POOL, SERVED_POOL, DRY_POOL = 1_048_576 + 8192, 700_000, 1024
COUNTERS_S = 0.3
"""Metrics are published ten times a second."""


def small_server(settings: Settings, model: str, *, dyncp: bool) -> GpuServer:
    """Part (b): the small models of the runtime's own check, stock with one large pool."""
    flags = ("--flashinfer-mla-disable-ragged",) if model == "mla" else ()
    pool = SIZES[settings.device].pool
    instances, tokens = (settings.num_gpus, pool) if dyncp else (1, 4 * pool)
    name = f"b_{model}" if dyncp else f"b_{model}_stock"
    return GpuServer(name, small_model(model, settings), instances, tokens, dyncp, flags, device=settings.device)


def small_model(name: str, settings: Settings) -> Path:
    if settings.dry:
        return ROOT / "testing" / "models" / "qwen3moe"
    experts = max(4, settings.num_gpus)  # one per instance at least
    written = settings.work / "models" / f"{name}_{experts}experts"
    # Another server may be reading it.
    there = (written / "model.safetensors").is_file()
    return written if there else random_models.write_model(name, settings.work / "models", num_experts=experts)


def build_server(name: str, settings: Settings) -> GpuServer:
    if name.startswith("b_"):
        model = name.split("_")[1]
        return small_server(settings, model, dyncp=name == f"b_{model}")
    pool = DRY_POOL if settings.dry else LONG_POOL if name == SYNTHETIC else SERVED_POOL
    server = layered_server(settings, name, dyncp=name != STOCK, pool=pool)
    if name == SYNTHETIC:
        server.flags += WITHOUT_PREFILL
    if name == DYNCP:
        (settings.work / PLACEMENTS).unlink(missing_ok=True)
        server.environment[LOG_VARIABLE] = str((settings.work / PLACEMENTS).resolve())
    return server


class ServerPool:
    """By name. On GPUs servers live side by side (idle ones leave the GPU alone); in the dry form one at a time."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.servers: dict[str, GpuServer] = {}
        self._warm: set[str] = set()
        self._busy: set[str] = set()
        self._started = 0
        self._stack = ExitStack()
        self._locked = False

    def start(self, *names: str) -> None:
        """Does not wait. In the dry form nothing is started ahead."""
        if not self.settings.dry:
            for name in names:
                self._start(name)

    def settle(self, *names: str) -> None:
        """Starts them and waits until each answers or has ended: a server that starts would disturb one that is timed."""
        if not self.settings.dry:
            self.start(*names)
            wait_ready([self.servers[name] for name in names], time.monotonic() + START_LIMIT_S)

    def _start(self, name: str) -> GpuServer:
        if name not in self.servers:
            if self.settings.dry and not self._locked:
                self._stack.enter_context(machine_lock())
                self._locked = True
            self.settings.work.mkdir(parents=True, exist_ok=True)
            server = build_server(name, self.settings)
            server.start(self.settings.work, find_free_port(*port_range(self._started % 12)))
            self._started += 1
            self.servers[name] = server
        return self.servers[name]

    def ready(self, name: str) -> GpuServer:
        """The server when it answers; ServerRefused when it has ended instead."""
        if self.settings.dry:
            self.stop(*(other for other in self.servers if other != name))
        server = self._start(name)
        if server.ready_s is None:
            wait_ready([server], time.monotonic() + START_LIMIT_S)
            print(f"server {name}: ready after {server.ready_s} s of waiting", file=sys.stderr, flush=True)
        if server.ready_s is None or not server.alive:
            raise ServerRefused(server)
        return server

    @contextmanager
    def using(self, name: str) -> Iterator[GpuServer]:
        """A ready server that has answered a short request. One that is left by an error shows its stacks when it is stopped."""
        server = self.ready(name)
        self._busy.add(name)
        if name not in self._warm and not name.startswith("b_"):
            warm_up(server, self.settings)
            self._warm.add(name)
        yield server
        self._busy.discard(name)

    def stop(self, *names: str) -> None:
        for name in names:
            server = self.servers.get(name)
            if server is not None and server.dyncp and server.alive and (server.ready_s is None or name in self._busy):
                server.dump_stacks()
        stop_all([self.servers.pop(name) for name in names if name in self.servers])
        self._warm -= set(names)
        self._busy -= set(names)

    def close(self) -> None:
        try:
            self.stop(*self.servers)
        finally:
            self._stack.close()


def warm_up(server: GpuServer, settings: Settings) -> None:
    """Compiles what the first requests would: a whole chunk of prefill, decode steps of every degree."""
    length = 200 if settings.dry else 9000
    degrees = range(1, settings.num_gpus + 1) if server.dyncp else (1,)
    for degree in degrees:
        sampling = pinned(degree, 0) if server.dyncp else {"ignore_eos": True}
        server.client.generate(prompt(length, 90 + degree), max_new_tokens=8, sampling=sampling)


def cost_model_notes(server: GpuServer, name: str) -> dict[str, str]:
    """What the server says it places by; nothing for stock."""
    found = re.search(r"dyncp: cost model (.*)", server.log())
    return {f"{name}, cost model": found[1]} if found else {}


def settled_counts(server: GpuServer) -> dict[str, float]:
    """answers.step_counts when the last steps are in them."""
    time.sleep(COUNTERS_S)
    return step_counts(server)
