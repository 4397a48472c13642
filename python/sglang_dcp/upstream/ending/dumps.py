"""What is worth knowing of a server that ends, once its clients have been answered."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
from collections.abc import Callable, Mapping

from sglang_dcp.upstream.ending.family import Family

logger = logging.getLogger(__name__)

STACKS_SECONDS = 10.0
"""Longest time for the stacks of one process."""


def dump_what_there_is(dump: Callable[[], None]) -> None:
    """Blocks. In place of TokenizerManager.dump_requests_before_crash, which is `dump`: requests, and GPUs where there are core dumps.

    SGLang always sleeps 65 s for core dumps of GPUs. They are written only by processes that were started with
    CUDA_ENABLE_USER_TRIGGERED_COREDUMP=1, so without it there is nothing to wait for. Stacks are ours to print: SGLang's way waits for
    processes that are stopped.
    """
    from sglang.srt.environ import envs

    core_dumps = writes_core_dumps(os.environ)
    with envs.SGLANG_PYSPY_DUMP_BEFORE_CRASH.override(False), envs.SGLANG_CUDA_COREDUMP_BEFORE_CRASH.override(core_dumps):
        dump()


def writes_core_dumps(environment: Mapping[str, str]) -> bool:
    """Whether GPU core dumps can be asked of this server's processes, and were not switched off."""
    wanted = environment.get("SGLANG_CUDA_COREDUMP_BEFORE_CRASH", "1").lower() not in ("0", "false", "no", "off")
    return wanted and environment.get("CUDA_ENABLE_USER_TRIGGERED_COREDUMP") == "1"


def print_stacks(family: Family) -> None:
    """Logs the Python stacks of every instance, with py-spy where it is installed. Processes are not paused: a stopped one would wait."""
    if shutil.which("py-spy") is None:
        logger.error("dyncp: no stacks: py-spy is not installed")
        return
    for pid, member in family.members.items():
        if not member.role.startswith("instance"):
            continue
        command = ["py-spy", "dump", "--nonblocking", "--pid", str(pid)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=STACKS_SECONDS, check=False)
        except subprocess.TimeoutExpired:
            logger.error("dyncp: no stacks of %s (pid %d) within %.0f s", member.role, pid, STACKS_SECONDS)
            continue
        logger.error("dyncp: stacks of %s (pid %d):\n%s", member.role, pid, done.stdout or done.stderr)
