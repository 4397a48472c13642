"""N processes that work together, one per GPU. When one fails, all are stopped and the error names the one that began it."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from benchmark.multi_gpu.settings import PartFailed

SETTLE_S = 2.0
"""How long after the first trouble the others may still report: peers of a dead rank fail too, and often speak first."""
PR_SET_PDEATHSIG = 1


class RankFailed(PartFailed):
    """Names the rank that failed first."""


def run_ranks(
    work: Callable[..., Any], num_ranks: int, arguments: tuple[Any, ...], *, seconds: float, kill_rank: int | None = None
) -> list[Any]:
    """work(rank, num_ranks, folder, *arguments) in a process each; their results by rank.

    folder: an empty one that all share (rendezvous). Raises RankFailed when a rank ends without a result, raises, or is not done in time.
    No process is left when this returns or raises. kill_rank: that rank ends itself before it works.
    """
    context = multiprocessing.get_context("forkserver")
    # torch is imported once, by the server of the forks, which itself never opens a GPU.
    context.set_forkserver_preload(["benchmark.multi_gpu.collective_rank"])
    processes: list[ForkServerProcess] = []
    pipes: list[Connection] = []
    with tempfile.TemporaryDirectory(prefix="dyncp_ranks_") as folder:
        try:
            for rank in range(num_ranks):
                ours, theirs = context.Pipe(duplex=False)
                parameters = (theirs, work, rank, num_ranks, Path(folder), arguments, rank == kill_rank)
                process = context.Process(target=_rank_main, args=parameters, name=f"rank {rank}", daemon=True)
                process.start()
                theirs.close()
                processes.append(process)
                pipes.append(ours)
            return _collect(processes, pipes, seconds)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                process.join(10.0)
            for pipe in pipes:
                pipe.close()


def _rank_main(
    pipe: Connection,
    work: Callable[..., Any],
    rank: int,
    num_ranks: int,
    folder: Path,
    arguments: tuple[Any, ...],
    dies: bool,
) -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # a killed report leaves no rank behind
    if dies:
        os._exit(17)
    try:
        result = work(rank, num_ranks, folder, *arguments)
    except BaseException:
        pipe.send(("error", traceback.format_exc()[-2500:]))
        raise
    pipe.send(("result", result))
    pipe.close()


def _collect(processes: list[ForkServerProcess], pipes: list[Connection], seconds: float) -> list[Any]:
    results: dict[int, Any] = {}
    errors: dict[int, str] = {}
    open_pipes = {pipe: rank for rank, pipe in enumerate(pipes)}
    deadline = time.monotonic() + seconds
    while open_pipes and time.monotonic() < deadline:
        for pipe in wait(list(open_pipes), timeout=max(0.0, deadline - time.monotonic())):
            assert isinstance(pipe, Connection)
            rank = open_pipes.pop(pipe)
            try:
                kind, value = pipe.recv()
            except EOFError:
                processes[rank].join(5.0)
                kind, value = "dead", f"ended without a result (exit code {processes[rank].exitcode})"
            if kind == "result":
                results[rank] = value
            else:
                errors[rank] = value if kind == "dead" else f"raised {value.strip().splitlines()[-1]}\n{value}"
                deadline = min(deadline, time.monotonic() + SETTLE_S)
    if errors:
        raise RankFailed(_blame(errors))
    if open_pipes:
        raise RankFailed(f"rank {', '.join(map(str, sorted(open_pipes.values())))} not done after {seconds:g} s")
    return [results[rank] for rank in range(len(processes))]


def _blame(errors: dict[int, str]) -> str:
    """A rank that died says nothing, and its peers complain about the lost connection: it comes first."""
    first = min(errors, key=lambda rank: (not errors[rank].startswith("ended without"), rank))
    others = sorted(set(errors) - {first})
    return f"rank {first} {errors[first]}" + (f"\n(then failed: rank {', '.join(map(str, others))})" if others else "")
