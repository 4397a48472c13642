"""Takes away the shared-memory files that a server leaves: SGLang ends its processes by SIGKILL and unlinks none of them.

Only files whose names SGLang and Python give them, and only those that a process of this server has mapped: people keep model weights in
/dev/shm too, and other servers their own files.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

logger = logging.getLogger(__name__)

FOLDER = Path("/dev/shm")
PREFIXES = ("sgl_shm_", "sglang_loads_", "sem.mp-", "psm_", "torch_")
"""Message queues and snapshots of SGLang, semaphores and blocks of Python's multiprocessing, tensors of torch."""


class SharedFiles:
    """Files of one server. `note` while its processes live, `unlink` when all have gone."""

    def __init__(self, folder: Path = FOLDER, processes: Path = Path("/proc")) -> None:
        self._folder = folder
        self._processes = processes
        self._names: set[str] = set()

    def note(self, pids: Iterable[int]) -> None:
        """Reads what these processes have mapped now. One that has gone, or may not be read, adds nothing."""
        for pid in pids:
            try:
                maps = (self._processes / str(pid) / "maps").read_text(errors="replace")
            except OSError:
                continue
            self._names.update(_names_in(maps, self._folder))

    def unlink(self) -> list[str]:
        """Removes what is still there; returns the names."""
        removed = []
        for name in sorted(self._names):
            try:
                (self._folder / name).unlink()
            except FileNotFoundError:
                continue
            except OSError as error:
                logger.error("dyncp: shared-memory file %s stays: %s", self._folder / name, error)
                continue
            removed.append(name)
        return removed


def _names_in(maps: str, folder: Path) -> set[str]:
    """Names of files right below `folder` in the text of a /proc/PID/maps that are of the kinds above."""
    names = set()
    for line in maps.splitlines():
        path = line.partition(f"{folder}/")[2]
        if path.startswith(PREFIXES) and "/" not in path and not path.endswith(" (deleted)"):
            names.add(path)
    return names
