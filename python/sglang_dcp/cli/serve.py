"""`sglang-dcp serve`: SGLang's server with the environment that this machine needs. Prints what it adds, then becomes the server, or with
--restart its parent."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sglang_dcp.cli.config_file import with_config_file
from sglang_dcp.cli.supervise import supervise
from sglang_dcp.config import add_cli_arguments
from sglang_dcp.cpu.environment import count_cuda_devices, cpu_additions

EARLY_SEND = "SGLANG_DISAGG_PREFILL_EARLY_SEND_CACHED_PREFIX"
"""Of a prefill server: at a prefix hit it records a CUDA event."""


@dataclass(frozen=True)
class Launch:
    """What will be executed: `python -m sglang.launch_server flags` with `additions` on top of the environment."""

    flags: tuple[str, ...]
    additions: Mapping[str, str]
    added_flags: tuple[str, ...]


def run(flags: Sequence[str]) -> int:
    """Replaces this process by the server, or with --restart stays its parent. Returns the exit code of the latter, and for --help."""
    if "-h" in flags or "--help" in flags:
        print(_help())
        return 0
    restarts, server_flags = split_restart(name_model(flags))
    launch = plan_launch(server_flags, os.environ, cuda_devices=count_cuda_devices())
    for line in describe(launch):
        print(line, file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "sglang.launch_server", *launch.flags]
    environment = {**os.environ, **launch.additions}
    if restarts is not None:
        return supervise(command, environment, restarts)
    os.execve(sys.executable, command, environment)


def name_model(flags: Sequence[str]) -> Sequence[str]:
    """`sglang serve MODEL` is short for --model-path MODEL; `python -m sglang.launch_server`, which this becomes, does not know that."""
    return ["--model-path", *flags] if flags and not flags[0].startswith("-") else flags


def split_restart(flags: Sequence[str]) -> tuple[int | None, list[str]]:
    """(N of --restart N, or None; the other flags). It is ours alone: SGLang does not know it."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    _add_restart(parser)
    try:
        known, others = parser.parse_known_args(list(flags))
    except argparse.ArgumentError as error:
        raise SystemExit(f"sglang-dcp serve: {error}") from error
    if known.restart is not None and known.restart < 1:
        raise SystemExit(f"sglang-dcp serve: --restart must be at least 1, got {known.restart}")
    return known.restart, others


def _add_restart(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    parser.add_argument(
        "--restart",
        type=int,
        metavar="N",
        help="Start the server again when an instance was lost (exit code 75) or it was killed, at most N times in ten minutes.",
    )


def plan_launch(flags: Sequence[str], environment: Mapping[str, str], *, cuda_devices: int | None) -> Launch:
    """Decides what to add. cuda_devices: None without a CUDA driver. Pure, so that it can be tested.

    On a GPU machine nothing is added. On a CPU: --device cpu, the environment of cpu/environment.py and, without --enable-dyncp
    (which picks its own backend), --attention-backend torch_native; each only where the flags do not say otherwise.
    """
    known = _read_known_flags(flags)
    on_cpu = known.device == "cpu" or (known.device is None and not cuda_devices)
    if not on_cpu:
        return Launch(tuple(flags), {}, ())
    added: list[str] = []
    if known.device is None:
        added += ["--device", "cpu"]
    if known.attention_backend is None and not known.enable_dyncp:
        added += ["--attention-backend", "torch_native"]
    added += _disaggregation_flags(known)
    additions = cpu_additions(known.tp, environment, has_cuda_driver=cuda_devices is not None)
    if known.mode == "prefill" and EARLY_SEND not in environment:
        additions[EARLY_SEND] = "0"
    return Launch((*flags, *added), additions, tuple(added))


def _disaggregation_flags(known: argparse.Namespace) -> list[str]:
    """What a decode server on a CPU lacks: an all-to-all without a kernel there, and host memory that is registered with CUDA."""
    if known.mode != "decode":
        return []
    flags = [] if known.lm_head_all_to_all is not None else ["--no-enable-tp-lm-head-all-to-all"]
    return flags + ([] if known.retraction_backup is not None else ["--disaggregation-decode-retraction-backup", "cpu_tensor"])


def describe(launch: Launch) -> list[str]:
    """One line per addition; none where nothing is added."""
    lines = [f"sglang-dcp serve: {name}={value}" for name, value in launch.additions.items()]
    if launch.added_flags:
        lines.append(f"sglang-dcp serve: adding {' '.join(launch.added_flags)}")
    return lines


def _read_known_flags(flags: Sequence[str]) -> argparse.Namespace:
    """The few upstream flags that decide about the environment, from the command line and a config file; the rest is SGLang's to judge."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--tp", "--tp-size", "--tensor-parallel-size", dest="tp", type=int, default=1)
    parser.add_argument("--device", default=None)
    parser.add_argument("--attention-backend", default=None)
    parser.add_argument("--enable-dyncp", action="store_true")
    parser.add_argument("--disaggregation-mode", dest="mode", default=None)
    parser.add_argument("--disaggregation-decode-retraction-backup", dest="retraction_backup", default=None)
    parser.add_argument("--enable-tp-lm-head-all-to-all", dest="lm_head_all_to_all", action=argparse.BooleanOptionalAction, default=None)
    try:
        known, _ = parser.parse_known_args(with_config_file(flags))
    except argparse.ArgumentError as error:
        raise SystemExit(f"sglang-dcp serve: {error}") from error
    if known.tp < 1:
        raise SystemExit(f"sglang-dcp serve: --tp must be at least 1, got {known.tp}")
    return known


def _help() -> str:
    parser = argparse.ArgumentParser(
        prog="sglang-dcp serve",
        usage="sglang-dcp serve --model-path MODEL [any flag of `sglang serve`] [--enable-dyncp [--dyncp-...]]",
        description="Serves a model with SGLang. On a machine without a GPU it also sets what SGLang needs on a CPU, and says what.",
        epilog="SGLang's own flags: `sglang serve --help` (it does not list ours: help loads no plugins).",
        add_help=False,
    )
    _add_restart(parser.add_argument_group("this command"))
    add_cli_arguments(parser)
    return parser.format_help()
