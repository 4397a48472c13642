"""From the command line to the report: settings, the parts by letter, the head of the JSON."""

from __future__ import annotations

import argparse
import importlib
import platform
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmark.multi_gpu.report import Report, Terminated, violations
from benchmark.multi_gpu.server_pool import ServerPool
from benchmark.multi_gpu.settings import (
    DRY_RANKS,
    PARTS,
    QUICK,
    QUICK_RATE_S,
    QUICK_TOTAL_S,
    RATE_S,
    PartFailed,
    Settings,
    read_device_facts,
    set_environment,
)
from benchmark.multi_gpu.table import format_report
from benchmark.serving.provenance import provenance
from sglang_dcp.cpu.environment import count_cuda_devices

MODULES = {
    "a": "part_transport",
    "b": "part_tokens",
    "c": "part_deepep",
    "d": "part_step_time",
    "e": "part_serving",
    "f": "predictions",
}
SIZES = (2, 4, 8)


def build_settings(arguments: argparse.Namespace, work: Path) -> Settings:
    """Ends the program with a message when the machine or a flag does not fit."""
    seconds = {}
    for text in arguments.limit:
        part, _, value = text.partition("=")
        if part not in PARTS or not value.replace(".", "", 1).isdigit() or float(value) <= 0:
            raise SystemExit(f"--limit {text}: PART=SECONDS with a part of {', '.join(PARTS)}")
        seconds[part] = float(value)
    if arguments.servers and not arguments.dry:
        raise SystemExit("--servers belongs to --dry; on GPUs servers are always started")
    common: dict[str, Any] = {"out": arguments.out.resolve(), "work": work, "model": arguments.model, "num_layers": arguments.layers}
    common |= {"tpot_ms": arguments.tpot_ms, "kill_rank": arguments.kill_rank, "deepep_mode": arguments.deepep_mode}
    common |= {"letters": tuple(arguments.parts.split(","))}
    common |= {"seconds": (QUICK if arguments.quick else {}) | seconds, "rate_seconds": QUICK_RATE_S if arguments.quick else RATE_S}
    common["cost_model"] = arguments.cost_model
    if total := arguments.total or (QUICK_TOTAL_S if arguments.quick else None):
        common["deadline"] = time.monotonic() + total
    if arguments.dry:
        num_ranks = arguments.num_gpus or DRY_RANKS
        if num_ranks not in SIZES:
            raise SystemExit(f"--num-gpus {num_ranks}: this is for 2, 4 or 8 ranks")
        return Settings(num_gpus=num_ranks, dry=True, servers=arguments.servers, **common)
    there = count_cuda_devices() or 0
    num_gpus = arguments.num_gpus or there
    if num_gpus not in SIZES or num_gpus > there:
        raise SystemExit(f"this needs 2, 4 or 8 GPUs of one host: {there} here, --num-gpus {arguments.num_gpus}; --dry runs without one")
    set_environment()
    try:
        facts = read_device_facts()
    except PartFailed as error:
        raise SystemExit(str(error)) from error
    return Settings(num_gpus=num_gpus, facts=facts, **common)


def run_report(settings: Settings, letters: list[str], commit: str | None) -> int:
    """Exit code: 0, or 1 when a part failed or the report's own form is wrong."""
    if unknown := [letter for letter in letters if letter not in PARTS]:
        raise SystemExit(f"--parts {','.join(unknown)}: choose of {', '.join(PARTS)}")
    set_environment()
    head = provenance(" ".join(["python", "scripts/multi_gpu_report.py", *sys.argv[1:]]))
    head |= {"num_gpus": settings.num_gpus, "dry": settings.dry}
    if not settings.dry:
        head["machine"] = f"{platform.machine()}, {settings.num_gpus} x {settings.facts['names'][0]}"
    head["commit"] = commit or head["commit"] or "unknown"
    report = Report(head | {"model": settings.model, "logs": settings.work.name}, settings.out)
    parts = {letter: importlib.import_module(f"benchmark.multi_gpu.{MODULES[letter]}").run for letter in dict.fromkeys(letters)}
    pool = ServerPool(settings)
    try:
        succeeded = report.run(list(parts), parts, replace(settings, pool=pool))
    except Terminated:
        print("terminated; what was finished is in the report", file=sys.stderr)
        succeeded = False
    finally:
        pool.close()
    written = report.head | {"parts": report.sections}
    print(format_report(written))
    wrong = violations(written)
    if wrong:
        print(f"the report is malformed: {'; '.join(wrong)}", file=sys.stderr)
    print(f"written to {settings.out}")
    return 0 if succeeded and not wrong else 1
