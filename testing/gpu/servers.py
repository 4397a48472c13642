"""SGLang servers on a GPU for the runtime check: started together (a start is mostly imports), each with a log of its own."""

from __future__ import annotations

import http.client
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path

from testing.client import Client, RequestFailed
from testing.ports import find_free_port
from testing.processes import end_process_tree

HERE = Path(__file__).resolve().parent
READY = "fired up and ready"
ONE_GPU = {"SGLANG_ONE_VISIBLE_DEVICE_PER_PROCESS": "1", "NCCL_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1"}
ENVIRONMENT = {
    "PYTHONUNBUFFERED": "1",
    "PYTHONFAULTHANDLER": "1",
    # Several servers share the GPU, so the ranks see different amounts of free memory.
    "SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK": "0",
    # One prefill kernel for all: the ragged one of the stock path would be compiled for minutes.
    "SGLANG_FLASHINFER_USE_PAGED": "1",
}


@dataclass
class GpuServer:
    """One server. flags: further flags. one_gpu: every rank on GPU 0. device cpu: the same check without a GPU, slowly.

    slices: processes of an instance, attention TP. chunk_tokens: most prefill tokens of one instance in one step; None: an eighth of the
    pool, 0: SGLang's own default. environment: further variables, of this server alone. plugins: folders beside this file with SGLang
    plugins of the tests.
    """

    name: str
    model_path: Path
    instances: int
    pool_tokens: int
    dyncp: bool
    flags: tuple[str, ...] = ()
    slices: int = 1
    one_gpu: bool = False
    device: str = "cuda"
    environment: dict[str, str] = field(default_factory=dict)
    chunk_tokens: int | None = None
    plugins: tuple[str, ...] = ()
    port: int = 0
    process: subprocess.Popen[bytes] | None = None
    log_path: Path = field(default_factory=Path)
    ready_s: float | None = None

    def command(self) -> list[str]:
        run = ["sglang_dcp.cli.commands", "serve"] if self.device == "cpu" else ["sglang.launch_server"]
        command = [sys.executable, "-m", *run, "--model-path", str(self.model_path), "--port", str(self.port), "--skip-server-warmup"]
        command += [
            "--context-length",
            "8192" if self.device == "cuda" else "4096",
            "--page-size",
            "16",
            "--max-total-tokens",
            str(self.pool_tokens),
        ]
        chunk = self.pool_tokens // 8 if self.chunk_tokens is None else self.chunk_tokens
        ranks = str(self.instances * self.slices)
        command += ["--tp", ranks]
        if chunk:
            command += ["--chunked-prefill-size", str(chunk * self.instances)]
        if self.slices > 1:
            command += ["--attn-dp-size", str(self.instances), "--ep", ranks]
        if self.device == "cuda":
            command += ["--dtype", "bfloat16", "--attention-backend", "flashinfer", "--sampling-backend", "pytorch"]
            command += ["--disable-prefill-cuda-graph", "--cuda-graph-max-bs-decode", "8", "--mem-fraction-static", "0.6"]
            # The fused all-reduce may choose NVLink multicast by itself.
            command += ["--disable-custom-all-reduce", "--disable-flashinfer-autotune", "--enforce-disable-flashinfer-allreduce-fusion"]
        else:
            command += ["--dtype", "float32"]
        if self.dyncp:
            command += ["--enable-dyncp", "--enable-metrics"]
        return command + list(self.flags)

    def start(self, log_folder: Path, port: int) -> None:
        self.port, self.log_path = port, log_folder / f"{self.name}.log"
        environment = os.environ | ENVIRONMENT | (ONE_GPU if self.one_gpu else {}) | self.environment
        plugins = (*self.plugins, *(("one_gpu",) if self.one_gpu else ()))
        if plugins:
            environment["PYTHONPATH"] = os.pathsep.join([os.environ.get("PYTHONPATH", ""), *(str(HERE / name) for name in plugins)])
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                self.command(), stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment, start_new_session=True
            )

    @property
    def uses_peer_memory(self) -> bool:
        return self.device == "cuda" and self.dyncp and "--dyncp-transport" not in self.flags

    @property
    def client(self) -> Client:
        return Client(self.port, timeout_s=120.0)

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def is_ready(self) -> bool:
        return READY in self.log()

    def freeze_garbage(self) -> bool:
        """False while nothing listens yet. Else every process but the router keeps what it holds out of further garbage collections.

        SGLang asks itself for that before it says that it is ready, which with --skip-server-warmup is before it listens: in vain. A
        scheduler then stops for 0.2 to 0.6 s at each full collection, and with it all others: the window that is measured meanwhile is
        spoilt.
        """
        try:
            status, text = Client(self.port, timeout_s=10.0).request("POST", "/freeze_gc")
        except (OSError, http.client.HTTPException):
            return False
        if status != HTTPStatus.OK:
            raise RequestFailed(status, text)
        return True

    def dump_stacks(self) -> None:
        """Makes every Python process of the server write its stacks to the log and end. For a server that hangs."""
        import psutil

        if self.process is None or not self.alive:
            return
        for process in psutil.Process(self.process.pid).children(recursive=True):
            process.send_signal(signal.SIGABRT)
        time.sleep(1.0)


def port_range(index: int) -> tuple[int, int]:
    """Where the index-th server's port is looked for: SGLang draws further ones from the 1,000 above it. DYNCP_FIRST_PORT: of the first
    one, where two programs start servers side by side."""
    first = int(os.environ.get("DYNCP_FIRST_PORT", "15000"))
    return first + 1200 * index, first + 1200 * (index + 1)


def start_all(servers: list[GpuServer], log_folder: Path, first: int = 0) -> None:
    """first: how many servers stand already, which took the ports below."""
    for index, server in enumerate(servers, first):
        server.start(log_folder, find_free_port(*port_range(index)))


def stop_all(servers: list[GpuServer]) -> None:
    """Ends every server with its whole process tree, all at once."""
    with ThreadPoolExecutor(max(1, len(servers))) as pool:
        list(pool.map(lambda server: server.process and end_process_tree(server.process.pid, grace_s=2.0), servers))


def wait_ready(servers: list[GpuServer], deadline: float) -> None:
    """Returns when every server is ready and has frozen its garbage, has ended, or `deadline` (time.monotonic) has passed. Sets ready_s of
    those that are."""
    began = time.monotonic()
    while time.monotonic() < deadline:
        waiting = [server for server in servers if server.ready_s is None and server.alive]
        for server in waiting:
            if server.is_ready() and server.freeze_garbage():
                server.ready_s = time.monotonic() - began
        if not waiting:
            return
        time.sleep(0.25)
