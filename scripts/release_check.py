"""`make release-check`: builds the wheels, installs them into a fresh environment, and runs the demo from what is installed.

    python scripts/release_check.py [--reuse .venv] [--folder DIR]

By default pip installs everything anew (11 GB, three minutes). --reuse takes SGLang and torch from another environment's site-packages and
installs our two wheels alone; it checks our wheels as well, but not that their requirements are complete.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
PROJECTS = (REPOSITORY, REPOSITORY / "sgl-kernel-dcp")
WHERE = (
    "import importlib.metadata, sglang_dcp, sgl_kernel_dcp;"
    "print(importlib.metadata.version('sglang-dcp'), sglang_dcp.__file__, sgl_kernel_dcp.__file__)"
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reuse", type=Path, metavar="VENV", help="take everything but our wheels from this environment")
    parser.add_argument("--folder", type=Path, help="where to make the environment; default: a temporary one, removed at the end")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="sglang_dcp_release_") as temporary:
        folder = arguments.folder or Path(temporary)
        wheels = build_wheels(folder / "wheels")
        python = make_environment(folder / "venv", wheels, arguments.reuse)
        check_where(python, folder / "venv")
        print("release-check: the demo, from the installed wheel", flush=True)
        return subprocess.run([python, "-m", "testing.demo"], cwd=folder, env=demo_environment(), check=False).returncode


def build_wheels(folder: Path) -> list[Path]:
    """One wheel of each project, from a copy of its tracked files: a checkout may hold builds of yesterday."""
    for project in PROJECTS:
        with tempfile.TemporaryDirectory() as copy:
            copy_tracked(project, Path(copy))
            _run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", folder, copy])
    wheels = sorted(folder.glob("*.whl"))
    print("release-check:", ", ".join(wheel.name for wheel in wheels), flush=True)
    return wheels


def copy_tracked(project: Path, target: Path) -> None:
    """Files that git knows or would add, with their uncommitted changes; without ignored ones."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=project, capture_output=True, text=True, check=True
    )
    for name in filter(None, listed.stdout.split("\0")):
        source, copy = project / name, target / name
        if source.is_file():
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(source.read_bytes())


def make_environment(folder: Path, wheels: Sequence[Path], reuse: Path | None) -> Path:
    """A virtual environment with the wheels; returns its Python."""
    _run([sys.executable, "-m", "venv", folder])
    python = folder / "bin" / "python"
    install = [python, "-m", "pip", "install", "--disable-pip-version-check"]
    if reuse is None:
        _run([*install, *wheels])
        return python
    packages = [path for path in (reuse.resolve() / "lib").glob("python3.*/site-packages") if path.is_dir()]
    if len(packages) != 1:
        raise SystemExit(f"release-check: {reuse} is no virtual environment: {len(packages)} folders lib/python3.*/site-packages")
    own = next((folder / "lib").glob("python3.*/site-packages"))
    # A plain path: .pth files in that folder (an editable install of this package) are not read.
    (own / "reused.pth").write_text(f"{packages[0]}\n")
    _run([*install, "--quiet", "--no-deps", *wheels])
    return python


def check_where(python: Path, environment: Path) -> None:
    """Both packages must come from the environment and not from the checkout."""
    done = subprocess.run([python, "-c", WHERE], cwd=environment, env=demo_environment(), capture_output=True, text=True, check=True)
    version, *files = done.stdout.split()
    for file in files:
        if not Path(file).resolve().is_relative_to(environment.resolve()):
            raise SystemExit(f"release-check: {file} is not in {environment}: the wheel is not what is imported")
    print(f"release-check: sglang-dcp {version} imported from {environment}", flush=True)


def demo_environment() -> dict[str, str]:
    """The demo itself lies in the checkout's root, and our packages do not: scripts/demo.py would take those of the checkout."""
    return clean_environment() | {"PYTHONPATH": str(REPOSITORY)}


def clean_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}


def _run(command: Sequence[str | Path]) -> None:
    subprocess.run(command, check=True, env=clean_environment())


if __name__ == "__main__":
    raise SystemExit(main())
