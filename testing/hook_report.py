"""Which hooks are in place in each process of a server: makes a configuration report it, and reads the report."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

from testing.forked import python_path
from testing.hook_probe.dyncp_hook_probe import APART_VARIABLE, FOLDER_VARIABLE, RAISE_VARIABLE
from testing.server import ServerConfig

_PLUGIN_FOLDER = Path(__file__).parent / "hook_probe"


def reporting_hooks(config: ServerConfig, folder: Path) -> ServerConfig:
    """The same server, writing the patched targets of each of its processes into `folder`."""
    return _with_plugin(config, FOLDER_VARIABLE, folder)


def raising_by(config: ServerConfig, file: Path) -> ServerConfig:
    """The same server, whose instance R (slice S of it, where it has several) raises in its next forward pass once `file` holds R (R.S)."""
    return _with_plugin(config, RAISE_VARIABLE, file)


def going_apart_by(config: ServerConfig, file: Path) -> ServerConfig:
    """The same server, whose process that `file` names likewise has decided otherwise than all others."""
    return _with_plugin(config, APART_VARIABLE, file)


def _with_plugin(config: ServerConfig, variable: str, path: Path) -> ServerConfig:
    """The plugin's folder comes before what this run itself has on its path."""
    added = (("PYTHONPATH", python_path(_PLUGIN_FOLDER, os.environ)), (variable, str(path)))
    return dataclasses.replace(config, environment=config.environment + added)


def read_hook_reports(folder: Path) -> list[set[str]]:
    """Patched targets, one set per process that loaded plugins."""
    return [set(json.loads(path.read_text())["patched"]) for path in sorted(folder.glob("*.json"))]


def tell(file: Path, who: str) -> None:
    """Names the process that `raising_by` or `going_apart_by` is about. In one go: one that finds the file empty would pass it by."""
    partial = file.with_suffix(".partial")
    partial.write_text(who)
    partial.replace(file)
