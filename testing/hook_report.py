"""Which hooks are in place in each process of a server: makes a configuration report it, and reads the report."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from testing.hook_probe.dyncp_hook_probe import FOLDER_VARIABLE
from testing.server import ServerConfig

_PLUGIN_FOLDER = Path(__file__).parent / "hook_probe"


def reporting_hooks(config: ServerConfig, folder: Path) -> ServerConfig:
    """The same server, writing the patched targets of each of its processes into `folder`."""
    added = (("PYTHONPATH", str(_PLUGIN_FOLDER)), (FOLDER_VARIABLE, str(folder)))
    return dataclasses.replace(config, environment=config.environment + added)


def read_hook_reports(folder: Path) -> list[set[str]]:
    """Patched targets, one set per process that loaded plugins."""
    return [set(json.loads(path.read_text())["patched"]) for path in sorted(folder.glob("*.json"))]
