"""Console script `sglang-dcp`. Each command lives in a module of its own, imported when it is called.

A command module has add_arguments(parser) and run(args) -> exit code. `serve` passes its flags on to SGLang untouched, so it has
no parser here.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    name: str
    module: str
    summary: str


COMMANDS = (
    Command("serve", "sglang_dcp.cli.serve", "start a server: any SGLang flag, plus --enable-dyncp and --dyncp-*"),
    Command("requests", "sglang_dcp.cli.requests", "home, shards and degree of finished and running requests"),
    Command("top", "sglang_dcp.cli.top", "live view of the instances"),
    Command("plan", "sglang_dcp.cli.plan", "predict step time and placement for a load"),
    Command("calibrate", "sglang_dcp.cli.calibrate", "fit the cost model from measurements"),
    Command("doctor", "sglang_dcp.cli.doctor", "check this machine and this installation"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code. `serve` replaces the process and does not return."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print(_help())
        return 0 if given else 2
    if given[0] == "--version":
        return _print_version()
    command = next((c for c in COMMANDS if c.name == given[0]), None)
    if command is None:
        print(f"sglang-dcp: unknown command {given[0]!r}; one of {', '.join(c.name for c in COMMANDS)}", file=sys.stderr)
        return 2
    try:
        module = importlib.import_module(command.module)
    except ModuleNotFoundError as error:
        if error.name is None or not command.module.startswith(error.name):
            print(f"sglang-dcp {command.name}: module {error.name!r} is missing; pip install sglang-dcp[test]", file=sys.stderr)
        else:
            print(f"sglang-dcp {command.name}: this build does not contain {command.module}", file=sys.stderr)
        return 1
    if command.name == "serve":
        return int(module.run(given[1:]))
    parser = argparse.ArgumentParser(prog=f"sglang-dcp {command.name}", description=command.summary)
    module.add_arguments(parser)
    parsed = parser.parse_args(given[1:])
    try:
        code = int(module.run(parsed))
        sys.stdout.flush()
    except BrokenPipeError:  # a reader such as `head` has enough; what is still buffered must not raise at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    return code


def _help() -> str:
    width = max(len(c.name) for c in COMMANDS)
    lines = [f"  {c.name:<{width}}  {c.summary}" for c in COMMANDS]
    return "usage: sglang-dcp COMMAND [arguments]\n\n" + "\n".join(lines) + "\n\nsglang-dcp COMMAND --help tells more."


def _print_version() -> int:
    from importlib.metadata import version

    print(f"sglang-dcp {version('sglang-dcp')} on sglang {version('sglang')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
