"""`sglang-dcp doctor`: is this machine and this installation fit to serve? One line per check, exit code 1 if one fails."""

from __future__ import annotations

import argparse
import os
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from sglang_dcp.cpu.environment import available_cores, count_cuda_devices, cuda_capabilities

HOPPER = (9, 0)
MINIMUM_MEMORY_GIB = 6.0
"""Four ranks of a tiny model on a CPU take about 1.2 GiB each, most of it imports."""


@dataclass(frozen=True)
class Finding:
    """Outcome of one check. ok=None is a remark that does not fail."""

    name: str
    ok: bool | None
    detail: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--port", type=int, default=30000, help="port that the server would listen on (default: SGLang's, 30000)")
    parser.add_argument("--no-hooks", action="store_true", help="skip importing SGLang to resolve the hooks (about 20 seconds)")


def run(args: argparse.Namespace) -> int:
    checks: list[Callable[[], Finding]] = [_python, _sglang_version, _plugin_entry_point, _device, _cores, _memory, _environment]
    checks.append(lambda: _port(args.port))
    if not args.no_hooks:
        checks.append(_hooks)
    failed = 0
    for check in checks:
        finding = check()
        mark = {True: "ok  ", False: "FAIL", None: "note"}[finding.ok]
        print(f"{mark}  {finding.name}: {finding.detail}", flush=True)
        failed += finding.ok is False
    print("ready to serve" if not failed else f"{failed} check(s) failed")
    return 1 if failed else 0


def _python() -> Finding:
    version = ".".join(str(part) for part in sys.version_info[:3])
    return Finding("python", sys.version_info >= (3, 11), f"{version} (needs 3.11 or newer)")


def pinned_sglang_version() -> str:
    """The one version that this package is made for, from its own metadata (`sglang==X`)."""
    for requirement in metadata.requires("sglang-dcp") or []:
        if requirement.startswith("sglang=="):
            return requirement.split("==")[1].split(";")[0].strip()
    raise RuntimeError("the metadata of sglang-dcp names no sglang==VERSION; install it again")


def _sglang_version() -> Finding:
    pin = pinned_sglang_version()
    try:
        have = metadata.version("sglang")
    except metadata.PackageNotFoundError:
        return Finding("sglang", False, f"not installed; needs {pin}")
    return Finding("sglang", have == pin, f"{have} (pinned: {pin})")


def _plugin_entry_point() -> Finding:
    group = "sglang.srt.plugins"
    ours = [entry for entry in metadata.entry_points(group=group) if entry.name == "sglang_dcp"]
    if not ours:
        return Finding("plugin", False, f"entry point sglang_dcp of group {group} is not visible; pip install sglang-dcp")
    allowed = [name.strip() for name in os.environ.get("SGLANG_PLUGINS", "").split(",") if name.strip()]
    if allowed and "sglang_dcp" not in allowed:
        return Finding("plugin", False, f"SGLANG_PLUGINS={','.join(allowed)} leaves sglang_dcp out")
    return Finding("plugin", True, f"{ours[0].value}")


def _device() -> Finding:
    devices = count_cuda_devices()
    if devices is None:
        return Finding("device", True, "no CUDA driver: the CPU serves, with the sgl_kernel stand-in (use `sglang-dcp serve`)")
    if devices == 0:
        return Finding("device", True, "CUDA driver without a device: the CPU serves (use `sglang-dcp serve`)")
    try:
        others = sorted({f"{major}.{minor}" for major, minor in cuda_capabilities() if (major, minor) != HOPPER})
    except OSError as error:
        return Finding("device", False, str(error))
    if others:
        found = f"{devices} CUDA device(s) of compute capability {', '.join(others)}"
        return Finding("device", False, f"{found}: --enable-dyncp needs Hopper (9.0)")
    return Finding("device", True, f"{devices} CUDA device(s), Hopper")


def _cores() -> Finding:
    cores = len(available_cores())
    return Finding("cores", True if cores >= 2 else None, f"{cores} available; with fewer cores than instances steps take turns")


def _memory() -> Finding:
    text = Path("/proc/meminfo")
    if not text.exists():
        return Finding("memory", None, "unknown on this system")
    fields = dict(line.split(":", 1) for line in text.read_text().splitlines())
    gib = int(fields["MemAvailable"].split()[0]) / 2**20
    return Finding("memory", gib >= MINIMUM_MEMORY_GIB, f"{gib:.1f} GiB available (needs {MINIMUM_MEMORY_GIB:.0f} for four instances)")


def _environment() -> Finding:
    names = ("SGLANG_USE_CPU_ENGINE", "SGLANG_CPU_OMP_THREADS_BIND", "SGLANG_PLATFORM", "SGLANG_DYNCP_CONFIG")
    present = [f"{name}={os.environ[name]}" for name in names if name in os.environ]
    if "SGLANG_DYNCP_CONFIG" in os.environ:
        return Finding("environment", False, f"{', '.join(present)}; SGLANG_DYNCP_CONFIG is set by the server itself: unset it")
    return Finding("environment", None if present else True, ", ".join(present) or "nothing set that would interfere")


def _port(port: int) -> Finding:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError) as error:
            return Finding("port", False, f"{port} cannot be used: {error}; choose another with --port")
    return Finding("port", True, f"{port} is free")


def _hooks() -> Finding:
    """Resolves every touch point in a child process that has the server's environment: importing SGLang depends on it."""
    import subprocess

    from sglang_dcp.cli.serve import plan_launch

    additions = plan_launch([], os.environ, cuda_devices=count_cuda_devices()).additions
    code = "from sglang_dcp.upstream.attach.catalogue import all_hooks, check_targets\nproblems = check_targets()\n"
    code += "print(len(all_hooks()), *problems, sep='\\n')"
    result = subprocess.run([sys.executable, "-c", code], env={**os.environ, **additions}, capture_output=True, text=True, check=False)
    if result.returncode:
        return Finding("hooks", False, "could not be checked: " + (result.stderr.strip().splitlines() or ["no message"])[-1])
    count, *problems = result.stdout.strip().splitlines()
    if problems:
        return Finding("hooks", False, "; ".join(problems))
    return Finding("hooks", True, f"all {count} touch points resolve")
