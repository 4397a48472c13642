"""What a prefill server sends: stopped in the middle, or counted (testing/transfer_probe)."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from testing.forked import python_path
from testing.server import ServerConfig
from testing.transfer_probe.dyncp_transfer_probe import FOLDER_VARIABLE, HELD, HOLD, NAME, SENT

_PLUGIN_FOLDER = Path(__file__).parent / "transfer_probe"


def probed(prefill: ServerConfig, folder: Path, *, stock: bool = False) -> ServerConfig:
    """The same prefill server with the probe, which looks at `folder`. stock: without this package but for what a CPU needs."""
    path = python_path(_PLUGIN_FOLDER, os.environ)
    plugins = (("SGLANG_PLUGINS", NAME),) if stock else ()
    return replace(prefill, environment=(*prefill.environment, ("PYTHONPATH", path), (FOLDER_VARIABLE, str(folder)), *plugins))


def hold_transfers(folder: Path) -> None:
    """From now on the server stops after a chunk; `is_held` once it has."""
    (folder / HOLD).touch()


def is_held(folder: Path) -> bool:
    return (folder / HELD).exists()


def pages_sent(folder: Path) -> float:
    """So far, a page once for each instance that it was sent to."""
    lines = (folder / SENT).read_text().splitlines() if (folder / SENT).exists() else []
    return sum(int(sent) / int(page) for sent, page in map(str.split, lines))
