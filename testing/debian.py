"""Programs of Debian for tests that need them (a browser, Prometheus): unpacked into a folder, nothing is installed, no root."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

DOWNLOAD_LIMIT_S = 300


class Unavailable(RuntimeError):
    """The program cannot be had on this machine; the message says why. Tests skip with it."""


@dataclass(frozen=True)
class Program:
    """path: of the executable. environment: what it needs to find its libraries."""

    path: Path
    environment: dict[str, str]


def find_program(package: str, name: str, folder: Path) -> Program:
    """The executable `name` of a Debian package: the installed one, or one that is downloaded with what it depends on and unpacked under
    `folder`. Raises Unavailable."""
    if installed := shutil.which(name):
        return Program(Path(installed), dict(os.environ))
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise Unavailable(f"{name} is not installed, and this is no Debian that {package} could be downloaded for")
    root = folder / package
    if not root.exists():
        _unpack(package, root)
    found = sorted(path for path in root.rglob(name) if path.is_file() and os.access(path, os.X_OK) and not _is_script(path))
    if not found:
        raise Unavailable(f"Debian's {package} has no executable {name}")
    libraries = sorted({str(path.parent) for path in root.rglob("*.so*")})
    return Program(found[0], dict(os.environ) | {"LD_LIBRARY_PATH": ":".join(libraries)})


def _unpack(package: str, root: Path) -> None:
    planned = _apt(["install", "--simulate", "--no-install-recommends", package], root.parent)
    missing = [line.split()[1] for line in planned.splitlines() if line.startswith("Inst ")]
    archives = root.with_name(f"{root.name}.archives")
    archives.mkdir(parents=True)
    _apt(["download", *missing], archives)
    for archive in sorted(archives.glob("*.deb")):
        subprocess.run(["dpkg-deb", "-x", str(archive), str(root)], check=True, timeout=DOWNLOAD_LIMIT_S)
    shutil.rmtree(archives)


def _apt(arguments: list[str], folder: Path) -> str:
    environment = dict(os.environ) | {"LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}
    try:
        result = subprocess.run(
            ["apt-get", *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=DOWNLOAD_LIMIT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise Unavailable(f"apt-get {arguments[0]} did not end within {DOWNLOAD_LIMIT_S} s") from None
    if result.returncode:
        raise Unavailable(f"apt-get {' '.join(arguments)}: {result.stderr.strip()[-300:]}")
    return result.stdout


def _is_script(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"#!"
