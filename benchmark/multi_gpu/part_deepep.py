"""Part (c): SGLang's DeepEP dispatcher and dyncp in one server, against the same server of stock.

First DeepEP's and DeepGEMM's kernels by themselves: where they do not run, servers need not be tried. Then answers and steps, with
`--deepep-mode auto` (normal kernels where something prefills, low-latency kernels in decode graphs), and with `normal` (no graphs) where
auto cannot be had. Asked for, `own-batch`: auto with dense layers and the head of each instance by itself, so that every instance replays
the graph of its own batch size. Stock with the same flags is the control: what it does not serve is no fault of ours.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmark.multi_gpu.deepep_rank import GEMMS, try_gemm, try_kernels
from benchmark.multi_gpu.part_tokens import ask_all, compare_degrees, prompts_for_all
from benchmark.multi_gpu.ranks import run_ranks
from benchmark.multi_gpu.report import FAILURES
from benchmark.multi_gpu.servers import GpuServer, ServerRefused, started, stock_flags
from benchmark.multi_gpu.settings import PartFailed, Settings, Skipped
from benchmark.multi_gpu.streams import stream
from testing.gpu import random_models
from testing.gpu.answers import pinned, prompt
from testing.gpu.runtime_cases import SIZES

PACKAGES = {"deep_ep": "sgl-deep-ep", "deep_gemm": "sgl-deep-gemm"}
MODEL = "gqa_wide"
FLAGS = ("--moe-a2a-backend", "deepep", "--moe-runner-backend", "deep_gemm")
"""Experts in bfloat16 behind DeepEP run on DeepGEMM alone."""
MODES = ("auto", "normal")
"""Those that are tried by themselves, in this order."""
OWN_BATCH = ("--moe-dense-tp-size", "1", "--enable-dp-lm-head")
MODE_FLAGS = {"auto": ("--deepep-mode", "auto"), "normal": ("--deepep-mode", "normal"), "own-batch": ("--deepep-mode", "auto", *OWN_BATCH)}
NEEDS = {"normal": ("normal", *GEMMS[2:])} | dict.fromkeys(("auto", "own-batch"), ("low_latency", "normal", *GEMMS))
"""Which kernels a mode runs."""
TRY_S = 60.0
STREAMED_PROMPT, STREAMED_TOKENS = 2000, 64


def run(settings: Settings, figures: dict[str, Any], save: Callable[[], None]) -> None:
    if settings.dry:
        raise Skipped("DeepEP needs GPUs")
    missing = [package for module, package in PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise Skipped(f"{' and '.join(missing)} not installed")
    notes = figures.setdefault("notes", {})
    kernels = figures["kernels"] = try_all_kernels(settings)
    notes |= {f"kernels, {name}": text for name, text in kernels.items()}
    save()
    failed, not_here = [], []
    for mode in MODES if settings.deepep_mode is None else (settings.deepep_mode,):
        try:
            require(mode, kernels)
            figures["rows"] += serve_and_compare(settings, mode)
        except Skipped as skipped:
            not_here.append(f"{mode}: {skipped}")
            notes[f"--deepep-mode {mode}"] = f"skipped: {skipped}"
        except FAILURES as error:
            failed.append(f"{mode}: {type(error).__name__}: {error}"[:1500])
            notes[f"--deepep-mode {mode}"] = "failed"
        else:
            notes[f"--deepep-mode {mode}"] = "served"
            break
        finally:
            save()
    if failed:
        raise PartFailed("; ".join(failed))
    if not figures["rows"]:
        raise Skipped("; ".join(not_here))


def try_all_kernels(settings: Settings) -> dict[str, str]:
    """What each kernel did, by its name, as a text that begins with "ok" when it works. Side by side: most of the time is compilation."""
    model, n = random_models.MODELS[MODEL], settings.num_gpus
    hidden, experts = model["hidden_size"], model["num_experts"]
    pool = ThreadPoolExecutor(3)
    try:
        tried = {mode: pool.submit(run_ranks, try_kernels, n, (mode, hidden, experts), seconds=TRY_S) for mode in ("low_latency", "normal")}
        shape = compiled(settings), hidden, model["moe_intermediate_size"], experts // n, n
        gemms = pool.submit(run_ranks, try_gemm, len(GEMMS), shape, seconds=TRY_S)
        found = {name: outcome(lambda result=result: result.result()[0]) for name, result in tried.items()}
        return found | {name: outcome(lambda place=place: gemms.result()[place]) for place, name in enumerate(GEMMS)}
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def compiled(settings: Settings) -> Path:
    """Where DeepGEMM keeps its kernels, for the servers too."""
    return settings.work / "deep_gemm"


def outcome(result: Callable[[], dict[str, Any]]) -> str:
    try:
        return "ok, " + ", ".join(f"{key} {value}" for key, value in result().items())
    except FAILURES as error:
        return f"failed: {error}"[:800]


def require(mode: str, kernels: dict[str, str]) -> None:
    broken = [f"{name} {kernels[name]}" for name in NEEDS[mode] if not kernels[name].startswith("ok")]
    if broken:
        raise Skipped(f"kernels that do not run here by themselves: {'; '.join(broken)}")


def build_servers(settings: Settings, mode: str) -> tuple[GpuServer, GpuServer]:
    """Ours and stock, with one model and the same flags."""
    n = settings.num_gpus
    path = random_models.write_model(MODEL, settings.work / "models")
    flags = (*FLAGS, *MODE_FLAGS[mode])
    pool = SIZES[settings.device].pool
    # Else DeepGEMM compiles for every batch size that there may be.
    environment = {"SGLANG_JIT_DEEPGEMM_PRECOMPILE": "0", "SGLANG_DG_CACHE_DIR": str(compiled(settings))}
    ours = GpuServer(f"c_{mode}", path, n, pool, True, flags, environment=environment)
    stock = GpuServer(f"c_{mode}_stock", path, n, pool, False, (*stock_flags(n), *flags), environment=environment)
    return ours, stock


def serve_and_compare(settings: Settings, mode: str) -> list[dict[str, Any]]:
    """Rows of one mode. Skipped where stock does not serve it, PartFailed where stock does and ours does not, or answers otherwise."""
    ours, stock = build_servers(settings, mode)
    prompts = prompts_for_all(settings)
    with started(settings, ours, stock, limit_s=settings.limit_s("c") / 2):
        try:
            if stock.ready_s is None:
                raise ServerRefused(stock)
            expected = ask_all(stock, prompts, [None] * len(prompts))
            stock_step = step_ms(stock, {})
        except FAILURES as error:
            raise Skipped(f"stock does not serve it here: {error}"[:1500]) from error
        if ours.ready_s is None:
            raise ServerRefused(ours)
        rows = compare_degrees(ours, prompts, expected, mode)
        for row in rows:
            row |= {"step_ms": step_ms(ours, pinned(row["degree"], 0)), "stock_step_ms": stock_step}
    if wrong := complaints(rows, mode, has_graphs=ours.uses_peer_memory):
        raise PartFailed("; ".join(wrong))
    return rows


def complaints(rows: Sequence[dict[str, Any]], mode: str, *, has_graphs: bool) -> list[str]:
    wrong = [f"degree {row['degree']}: answers differ from stock ({row})" for row in rows if not row["equal"]]
    if mode != "normal" and has_graphs:
        wrong += [f"degree {row['degree']}: no sharded step ran as a graph" for row in rows[1:] if not row["sharded_graph_steps"]]
    return wrong


def step_ms(server: GpuServer, sampling: dict[str, Any]) -> float:
    """Median time between two tokens of a lone request."""
    gaps = sorted(stream(server.client, prompt(STREAMED_PROMPT, 90), STREAMED_TOKENS, sampling).gaps())
    return round(gaps[len(gaps) // 2] * 1000, 3)
