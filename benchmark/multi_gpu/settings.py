"""What one run of the report is asked to do, and what machine it runs on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

ROOT = Path(__file__).resolve().parents[2]
PARTS = {
    "a": ("transport", 300.0),
    "b": ("served tokens", 420.0),
    "c": ("DeepEP and dyncp", 420.0),
    "d": ("step time by degree", 900.0),
    "e": ("stock DP against dyncp", 1500.0),
    "f": ("cost model", 30.0),
}
"""Letter -> (title, seconds that it may take)."""
QUICK = {"a": 110.0, "b": 120.0, "c": 170.0, "d": 200.0, "e": 330.0, "f": 15.0}
"""Limits of --quick, together with QUICK_TOTAL_S for everything."""
QUICK_TOTAL_S = 540.0
QUICK_RATE_S, RATE_S = 12.0, 20.0
"""Seconds of arrivals at one request rate of part (e)."""
LAST_PART_S = 12.0
"""Kept for (f) and for the end of the servers, where the report has an end."""

DRY_RANKS = 4
MULTICAST_OFF = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1"}
"""NVLink multicast stays off: a program that fails while it uses it can take the GPUs out of service for others."""

ONE_HOST = {
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
    "NCCL_IB_DISABLE": "1",
    "NVSHMEM_REMOTE_TRANSPORT": "none",
    "NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME": "lo",
}
"""All ranks are on this host, which may have no other network; GPUs talk over NVLink all the same."""

FACTS = """
import json, torch
n = torch.cuda.device_count()
peers = [[a == b or torch.cuda.can_device_access_peer(a, b) for b in range(n)] for a in range(n)]
names = [torch.cuda.get_device_name(i) for i in range(n)]
print(json.dumps({"names": names, "capabilities": [list(torch.cuda.get_device_capability(i)) for i in range(n)], "peers": peers}))
"""


class Skipped(Exception):
    """A part (or a step of one) that cannot run here; the message is the reason."""


class PartFailed(RuntimeError):
    """A part that ran and found something wrong; the message says what."""


class Servers(Protocol):
    """Servers that parts share, by name; server_pool.ServerPool is it."""

    def start(self, *names: str) -> None: ...

    def settle(self, *names: str) -> None: ...

    def using(self, name: str) -> AbstractContextManager[Any]: ...

    def stop(self, *names: str) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Settings:
    """num_gpus: instances, one GPU each (processes in the dry form). model: a name of model_shapes.SHAPES, for the parts with real layer
    shapes. kill_rank: this rank of part (a) ends itself, for the test of this report. seconds: limits that replace those of PARTS.
    deadline: time.monotonic() at which the whole report ends. letters: the parts asked for. pool: servers that parts share. deepep_mode:
    the only one of part (c). cost_model: what our servers with real layers are given to place by.
    """

    num_gpus: int
    out: Path
    work: Path
    dry: bool = False
    servers: bool = True
    model: str = "qwen3-235b-a22b"
    num_layers: int = 4
    tpot_ms: float = 50.0
    kill_rank: int | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    deadline: float = float("inf")
    rate_seconds: float = RATE_S
    letters: tuple[str, ...] = ()
    deepep_mode: str | None = None
    pool: Servers | None = None
    cost_model: str | None = None

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    @property
    def gpu(self) -> str:
        """The card as the cost models name it; "cpu" in the dry form."""
        if self.dry:
            return "cpu"
        name = self.facts["names"][0].lower()
        return next((card for card in ("h200", "h100") if card in name), name.replace(" ", "-"))

    def limit_s(self, part: str) -> float:
        """What the part may take from now on: its own limit, or less where the whole report ends before."""
        kept = 0.0 if part == "f" else LAST_PART_S
        return min(self.seconds.get(part, PARTS[part][1]), self.deadline - kept - time.monotonic())

    def require_servers(self) -> Servers:
        if not self.servers or self.pool is None:
            raise Skipped("the dry form starts servers with --servers only")
        return self.pool


def read_device_facts() -> dict[str, Any]:
    """Names, compute capabilities and peer access of all GPUs. In a process of its own: this one never opens a GPU."""
    done = subprocess.run([sys.executable, "-c", FACTS], capture_output=True, text=True, timeout=120, check=False)
    if done.returncode != 0:
        raise PartFailed(f"the GPUs could not be read: {done.stderr.strip().splitlines()[-1:]}")
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def set_environment() -> None:
    """For every process that follows: no multicast, sockets of this host alone, and enough hardware queues."""
    os.environ |= MULTICAST_OFF | {name: os.environ.get(name, value) for name, value in ONE_HOST.items()}
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
