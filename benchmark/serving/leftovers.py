"""What a server has on this machine, and what is left of it when it has ended: processes, files, its port."""

from __future__ import annotations

import getpass
import os
import socket
from dataclasses import dataclass
from pathlib import Path

import psutil

SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class Possessions:
    """Taken while the server runs. files: those below /dev/shm that its processes have mapped; others on this machine have their own."""

    processes: tuple[psutil.Process, ...]
    titles: tuple[str, ...]
    files: frozenset[str]
    port: int

    @classmethod
    def of(cls, pid: int, port: int) -> Possessions:
        processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
        files: set[str] = set()
        for process in processes:
            for line in (Path("/proc") / str(process.pid) / "maps").read_text().splitlines():
                if name := line.partition(f"{SHARED_MEMORY}/")[2]:
                    files.add(name.removesuffix(" (deleted)"))
        return cls(tuple(processes), tuple(" ".join(p.cmdline()) for p in processes), frozenset(files), port)

    def instance(self, rank: int) -> psutil.Process:
        """The scheduler process of an instance."""
        found = [p for p, title in zip(self.processes, self.titles, strict=True) if title.startswith(f"sglang::scheduler_DP{rank}_")]
        if len(found) != 1:
            raise RuntimeError(f"{len(found)} processes of instance {rank} among {self.titles}")
        return found[0]

    def left(self) -> list[str]:
        """One line per thing that is still there; a parent that supervises the server is no part of it."""
        lines = [f"process {p.pid} {t[:80]}" for p, t in zip(self.processes, self.titles, strict=True) if _runs(p)]
        lines += [f"file {name}" for name in sorted(self.files) if (SHARED_MEMORY / name).exists()]
        return lines if _is_free(self.port) else [*lines, f"port {self.port}"]


def temporary_files(folder: Path | None) -> list[str]:
    """One line per thing below a server's own temporary folder, but for caches, which libraries keep in a folder of the user's name."""
    if folder is None:
        return []
    return [f"temporary {path.name}" for path in sorted(folder.iterdir()) if path.name != getpass.getuser()]


def _runs(process: psutil.Process) -> bool:
    try:
        return process.pid != os.getpid() and process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of the dead server may still fade away
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
