"""What a prefill server sends: stopped in the middle, counted, or sent as by one without this package (testing/transfer_probe)."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from testing.server import ServerConfig
from testing.transfer_probe.dyncp_transfer_probe import FOLDER_VARIABLE, HELD, HOLD, SEND_ALL, SENT

_PLUGIN_FOLDER = Path(__file__).parent / "transfer_probe"


def probed(prefill: ServerConfig, folder: Path) -> ServerConfig:
    """The same prefill server with the probe, which looks at `folder`."""
    path = os.pathsep.join(filter(None, (str(_PLUGIN_FOLDER), os.environ.get("PYTHONPATH"))))
    return replace(prefill, environment=(*prefill.environment, ("PYTHONPATH", path), (FOLDER_VARIABLE, str(folder))))


def hold_transfers(folder: Path) -> None:
    """From now on the server stops after a chunk; `is_held` once it has."""
    (folder / HOLD).touch()


def is_held(folder: Path) -> bool:
    return (folder / HELD).exists()


def send_everything(folder: Path) -> None:
    """Before the start: every page to every shard of its request, as by a prefill server without this package."""
    (folder / SEND_ALL).touch()


def bytes_sent(folder: Path) -> int:
    """K/V and first tokens so far."""
    return sum(map(int, (folder / SENT).read_text().split()))
