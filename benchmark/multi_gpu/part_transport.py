"""Part (a): dispatch, return and merge per row count, over peer memory and NCCL (gloo in the dry form), beside NanoCP's figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from benchmark.multi_gpu.collective_rank import RankResult, measure_collective
from benchmark.multi_gpu.exchange_cases import ExchangeCase, exchange_cases
from benchmark.multi_gpu.peer_rank import measure_peer
from benchmark.multi_gpu.ranks import run_ranks
from benchmark.multi_gpu.report import FAILURES
from benchmark.multi_gpu.settings import PartFailed, Settings, Skipped

ROW_COUNTS = (1, 2, 4, 8, 16, 32, 64)
SHAPES = ("deepseek-v3", "qwen3-235b-a22b")
LAYERS, REPEATS = 20, 9


def run(settings: Settings, figures: dict[str, Any], save: Callable[[], None]) -> None:
    n = settings.num_gpus
    failures = []
    if settings.dry:
        cases, transports = exchange_cases(n, ("tiny",), (1, 4)), ["gloo"]
    else:
        cases, transports = exchange_cases(n, SHAPES, ROW_COUNTS), ["nccl", "peer"]
    seconds = settings.limit_s("a") / len(transports)
    for transport in transports:
        try:
            results = measure(transport, settings, cases, seconds)
        except Skipped as skipped:
            figures.setdefault("notes", {})[transport] = f"skipped: {skipped}"
            continue
        except FAILURES as error:
            failures.append(f"{transport}: {error}")
            continue
        figures["rows"] += [row(transport, case, [result[i] for result in results]) for i, case in enumerate(cases)]
        notes = {note for result in results for entry in result for note in entry.notes.values()}
        if notes:
            figures.setdefault("notes", {})[transport] = "; ".join(sorted(notes))[:600]
        save()
    figures["fits"] = fits(figures["rows"])
    for fit in figures["fits"]:
        key = f"{fit['transport']}, {fit['shape']}, {fit['pattern']}"
        figures.setdefault("notes", {})[key] = f"{fit['fixed_us']} us + {fit['gb_per_s']} GB/s (NanoCP: 15.8 us + 361 GB/s)"
    if failures:
        raise PartFailed("; ".join(failures))


def measure(transport: str, settings: Settings, cases: list[ExchangeCase], seconds: float) -> list[list[RankResult]]:
    """Results by rank and case."""
    n, kill = settings.num_gpus, settings.kill_rank
    if transport == "gloo":
        return run_ranks(measure_collective, n, ("gloo", cases, 5, 2), seconds=seconds, kill_rank=kill)
    if transport == "nccl":
        return run_ranks(measure_collective, n, ("nccl", cases, LAYERS, REPEATS), seconds=seconds, kill_rank=kill)
    apart = [(a, b) for a, line in enumerate(settings.facts["peers"][:n]) for b, there in enumerate(line[:n]) if not there]
    if apart:
        raise Skipped(f"GPU {apart[0][0]} cannot map the memory of GPU {apart[0][1]}")
    if any(capability[0] != 9 for capability in settings.facts["capabilities"][:n]):
        raise Skipped(f"the kernels are compiled for sm_90, the GPUs are {settings.facts['names'][0]}")
    from sgl_kernel_dcp.build import build_library

    build_library()  # once, here: the ranks find it
    return run_ranks(measure_peer, n, (cases, LAYERS, REPEATS), seconds=seconds, kill_rank=kill)


def row(transport: str, case: ExchangeCase, ranks: Sequence[RankResult]) -> dict[str, Any]:
    """The slowest rank's medians: it is the one that the others wait for."""

    def slowest(stage: str) -> float | None:
        values = [entry.stages[stage] for entry in ranks if stage in entry.stages]
        return round(max(values), 2) if len(values) == len(ranks) else None

    rows, total, graph = case.routed_rows(), slowest("total_us"), slowest("graph_us")
    best = graph if graph is not None else total
    assert best is not None
    moved = rows * bytes_per_row(transport, case)
    return {
        "transport": transport,
        "shape": case.shape.name,
        "pattern": case.pattern,
        "rows": max(case.home_rows),
        "degree": case.degree,
        "routed_rows": rows,
        "dispatch_us": slowest("dispatch_us"),
        "return_us": slowest("return_us"),
        "merge_us": slowest("merge_us"),
        "total_us": total,
        "graph_us": graph,
        "bytes": moved,
        "gb_per_s": round(moved / best / 1e3, 3),
        "nanocp_us": round(case.nanocp_us(), 2),
    }


def bytes_per_row(transport: str, case: ExchangeCase) -> int:
    """One routed row, there and back. The process groups return float32, peer memory bfloat16; gloo sends float32 queries too."""
    query = case.shape.query_bytes(4 if transport == "gloo" else 2)
    return query + case.shape.return_bytes(2 if transport == "peer" else 4)


def fits(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Least squares of time over bytes, per transport, shape and pattern: the fixed time and the bandwidth beyond it."""
    groups: dict[tuple[str, str, str], list[tuple[float, float]]] = {}
    for entry in rows:
        time = entry["graph_us"] if entry["graph_us"] is not None else entry["total_us"]
        groups.setdefault((entry["transport"], entry["shape"], entry["pattern"]), []).append((entry["bytes"], time))
    found = []
    for (transport, shape, pattern), points in groups.items():
        mean_x, mean_y = (sum(point[axis] for point in points) / len(points) for axis in (0, 1))
        spread = sum((x - mean_x) ** 2 for x, _ in points)
        slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else 0.0
        bandwidth = round(1e-3 / slope, 2) if slope > 0 else None
        fixed = round(mean_y - slope * mean_x, 2)
        found.append({"transport": transport, "shape": shape, "pattern": pattern, "fixed_us": fixed, "gb_per_s": bandwidth})
    return found
