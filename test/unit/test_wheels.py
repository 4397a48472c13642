"""What the wheels hold: every tracked file of the packages, and nothing of the tests. Built as a user builds them, from tracked files."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


def tracked(folder: Path) -> set[str]:
    """Files below `folder` that git knows or would add, relative to it."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout
    return {name for name in listed.split("\0") if name and (folder / name).is_file()}


@pytest.fixture(scope="module")
def release_check() -> ModuleType:
    spec = importlib.util.spec_from_file_location("release_check", REPOSITORY / "scripts" / "release_check.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def contents(release_check: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """File names in each wheel, by distribution, without its own metadata."""
    found = {}
    for wheel in release_check.build_wheels(tmp_path_factory.mktemp("wheels")):
        with zipfile.ZipFile(wheel) as archive:
            found[wheel.name.split("-")[0]] = {name for name in archive.namelist() if ".dist-info/" not in name}
    return found


def test_the_demo_of_the_release_check_takes_the_wheels(release_check: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An environment whose packages are empty ones: the demo's processes import those, and the demo itself from the checkout."""
    site = tmp_path / "site"
    for name in ("sglang_dcp", "sgl_kernel_dcp"):
        (site / name).mkdir(parents=True)
        (site / name / "__init__.py").touch()
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="$PYTHONPATH:{site}" exec {sys.executable} -S "$@"\n')
    python.chmod(0o755)
    show = "import sglang_dcp, testing; print(sglang_dcp.__file__, testing.__file__)"
    shown = subprocess.run([python, "-c", show], env=release_check.demo_environment(), capture_output=True, text=True, check=True).stdout
    assert shown.split() == [str(site / "sglang_dcp" / "__init__.py"), str(REPOSITORY / "testing" / "__init__.py")]


def test_the_wheel_holds_the_package_whole_and_nothing_else(contents: dict[str, set[str]]) -> None:
    assert contents["sglang_dcp"] == tracked(REPOSITORY / "python")
    assert {f"sglang_dcp/cpu/standin/{name}/__init__.py" for name in ("sgl_kernel", "flashinfer")} <= contents["sglang_dcp"]
    assert "sglang_dcp/policy/data/cpu.json" in contents["sglang_dcp"]


def test_the_kernels_wheel_holds_their_sources(contents: dict[str, set[str]]) -> None:
    root = REPOSITORY / "sgl-kernel-dcp"
    sources = {f"sgl_kernel_dcp/{folder}/{name}" for folder in ("csrc", "include") for name in tracked(root / folder)}
    package = tracked(root / "python")
    assert contents["sgl_kernel_dcp"] == sources | package
    assert any(name.endswith(".cuh") for name in sources)


def test_both_have_one_version_and_the_changelog_has_it() -> None:
    projects = ("pyproject.toml", "sgl-kernel-dcp/pyproject.toml")
    versions = {tomllib.loads((REPOSITORY / name).read_text())["project"]["version"] for name in projects}
    assert len(versions) == 1
    pin = (REPOSITORY / "UPSTREAM_VERSION").read_text().strip()
    assert f"\n## {versions.pop()}, on SGLang {pin}\n" in (REPOSITORY / "CHANGELOG.md").read_text()


def test_the_image_and_the_dependency_are_the_pinned_release() -> None:
    pin = (REPOSITORY / "UPSTREAM_VERSION").read_text().strip()
    assert f"ARG SGLANG_VERSION={pin}\nFROM lmsysorg/sglang:v${{SGLANG_VERSION}}\n" in (REPOSITORY / "docker" / "Dockerfile").read_text()
    assert tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["dependencies"][0] == f"sglang=={pin}"


def test_the_image_installs_what_the_wheels_require_and_copies_what_is_there() -> None:
    """Its pip takes no requirements of ours by itself (--no-deps); what SGLang brings is there."""
    text = (REPOSITORY / "docker" / "Dockerfile").read_text()
    projects = ("pyproject.toml", "sgl-kernel-dcp/pyproject.toml")
    required = {need for name in projects for need in tomllib.loads((REPOSITORY / name).read_text())["project"]["dependencies"]}
    needed = {need for need in required if not need.startswith(("sglang==", "numpy", "torch"))}
    assert set(re.findall(r'"([\w-]+[<>=][^"]*)"', text)) == needed
    copied = [name for line in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE) for name in line.split()]
    assert len(copied) > 4
    assert [name for name in copied if not (REPOSITORY / name).exists()] == []
    assert set(copied).isdisjoint((REPOSITORY / ".dockerignore").read_text().split())


def test_the_workflow_runs_what_ci_runs_and_nothing_else() -> None:
    workflow = (REPOSITORY / ".github" / "workflows" / "ci.yml").read_text()
    assert [line.strip() for line in workflow.splitlines() if line.strip().startswith("- run:")] == ["- run: bash .ci/run"]
