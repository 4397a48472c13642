"""Servers of the report: one at a time (they share the GPUs), always stopped, with a log of their own."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from benchmark.multi_gpu.model_shapes import LONGEST_CONTEXT, model_flags, write_shape
from benchmark.multi_gpu.settings import ROOT, Settings
from testing.gpu.servers import GpuServer, start_all, stop_all, wait_ready
from testing.machine_lock import machine_lock

START_LIMIT_S = 400.0
WITHOUT_PREFILL = ("--disaggregation-mode", "decode", "--disaggregation-transfer-backend", "fake")
"""SGLang's own way to decode without prefills: K/V are what the pools hold."""
LINE_LIMIT = 300
GRAPH_SIZES = (1, 2, 4, 8, 16, 32, 64)
"""Batch sizes that are captured; each once per number of guest rows."""


class ServerRefused(RuntimeError):
    """The server ended at start; `refusal` is our own message when that is why, else ""."""

    def __init__(self, server: GpuServer) -> None:
        lines = [line[:LINE_LIMIT] for line in server.log().splitlines() if "server_args=" not in line]
        self.refusal = next((line.strip() for line in reversed(lines) if line.startswith("sglang_dcp: ")), "")
        super().__init__(self.refusal or f"server {server.name} is not ready; its log ends with: " + " | ".join(lines[-12:]))


@contextmanager
def started(settings: Settings, *servers: GpuServer, limit_s: float = START_LIMIT_S) -> Iterator[None]:
    """Starts the servers and waits until each answers (its ready_s tells), has ended, or shows its stacks because it hangs.

    Stops them in the end, whatever happens.
    """
    settings.work.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        if settings.dry:
            stack.enter_context(machine_lock())
        stack.callback(stop_all, list(servers))
        start_all(list(servers), settings.work)
        wait_ready(list(servers), time.monotonic() + limit_s)
        for server in servers:
            if server.ready_s is None:
                server.dump_stacks()
        yield


@contextmanager
def running(server: GpuServer, folder: Path, port: int, deadline: float) -> Iterator[None]:
    """One server, which answers; ServerRefused when it does not by `deadline` (time.monotonic). Logs go to `folder`. Stopped in the end,
    whatever happens."""
    try:
        server.start(folder, port)
        wait_ready([server], deadline)
        if server.ready_s is None:
            raise ServerRefused(server)
        yield
    finally:
        stop_all([server])


def stock_flags(num_gpus: int) -> tuple[str, ...]:
    """Stock data parallelism over all GPUs with SGLang's balancing by tokens; ours sets its own sizes."""
    return "--attn-dp-size", str(num_gpus), "--ep-size", str(num_gpus), "--load-balance-method", "total_tokens"


def layered_server(settings: Settings, name: str, *, dyncp: bool, pool: int) -> GpuServer:
    """A server with real layer shapes on all GPUs: ours, or stock data parallelism with SGLang's balancing by tokens.

    In the dry form: the tiny test model. Flags given here win over the class's own.
    """
    n = settings.num_gpus
    given = ("--dyncp-cost-model", settings.cost_model) if settings.cost_model else ()
    common = given if dyncp else stock_flags(n)
    if settings.dry:
        path = ROOT / "testing" / "models" / "qwen3moe"
        return GpuServer(name, path, n, pool, dyncp, common, device="cpu")
    path = write_shape(settings.model, settings.num_layers, settings.work / "models")
    sizes = ("--context-length", str(LONGEST_CONTEXT), "--page-size", "64", "--chunked-prefill-size", str(8192 * n))
    # The pool is given in tokens; the fraction only has to allow it beside the other servers on the GPU.
    sizes += ("--load-format", "dummy", "--mem-fraction-static", "0.9")
    # SGLang's token table takes 4 bytes per request and token of context: 128 requests of the longest would be half a GiB.
    sizes += ("--max-running-requests", str(GRAPH_SIZES[-1] * n), "--cuda-graph-max-bs-decode", str(GRAPH_SIZES[-1]))
    # One message in four tokens: steps of few layers are faster than SGLang's front end writes a message per token and request.
    sizes += ("--cuda-graph-bs-decode", *map(str, GRAPH_SIZES), "--stream-interval", "4")
    return GpuServer(name, path, n, pool, dyncp, (*sizes, *model_flags(settings.model), *common))
