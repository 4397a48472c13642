"""The flags of a YAML file behind --config, as SGLang merges them. Read here only to decide what this machine needs beside them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def with_config_file(flags: Sequence[str]) -> list[str]:
    """`flags` behind those of their config file, which they may contradict: the last word counts. A file that cannot be read as flags is
    left out; SGLang reads it next, and says what is wrong with it."""
    places = [place for place, flag in enumerate(flags) if flag == "--config"]
    if len(places) != 1 or places[0] + 1 == len(flags):
        return list(flags)
    place = places[0]
    return [*_read(Path(flags[place + 1])), *flags[:place], *flags[place + 2 :]]


def _read(path: Path) -> list[str]:
    import yaml  # type: ignore[import-untyped]  # comes with SGLang

    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return []
    return [word for key, value in values.items() for word in _words(f"--{key}", value)] if isinstance(values, dict) else []


def _words(flag: str, value: Any) -> list[str]:
    """A key may be spelled with underscores for SGLang's own check of it, but the flag is passed on as it stands."""
    if isinstance(value, bool):
        return [flag] if value else []
    if isinstance(value, list):
        return [flag, *map(str, value)] if value else []
    return [flag, str(value)]
