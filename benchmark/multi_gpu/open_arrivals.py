"""Part (e2): the highest request rate that a server holds under a limit of TPOT, with SGLang's own bench_serving as client."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmark.multi_gpu.servers import GpuServer
from benchmark.multi_gpu.settings import PartFailed, Settings
from benchmark.multi_gpu.trace import trace_lengths

ALPHABET = "abcdefghijklmnopqrstuvwxyz \n"
LEAST_RATE_S = 30.0
"""A try that has less than this left is not begun: the client alone takes a third of it to start."""
BISECTIONS = 2
CLIENT_START_S = 25.0
STAND_IN = """__version__ = "0"


def load_dataset(*_arguments, **_keywords):
    raise ImportError("Hugging Face's datasets is not installed here")
"""
TRACE_LONGEST = 131_072
PLACEMENTS = "placements.jsonl"
"""What our server writes its placements to (SGLANG_DYNCP_PLACEMENT_LOG), in the work folder."""


class OutOfTime(Exception):
    """A rate could not be tried to its end in the time that the part has left: it says nothing about the server."""


def write_dataset(path: Path, count: int, longest: int) -> float:
    """bench_serving's custom dataset from the trace's lengths, one character per token. Returns the mean tokens that a request holds."""
    rng, total = random.Random(3), 0.0
    with path.open("w") as lines:
        for prompt, output in trace_lengths(count, longest):
            texts = ["".join(rng.choices(ALPHABET, k=length)) for length in (prompt, output)]
            lines.write(json.dumps({"conversations": [{"content": text} for text in texts]}) + "\n")
            total += prompt + output / 2
    return total / count


def bench_command(port: int, model: Path, dataset: Path, rate: float, count: int, out: Path) -> list[str]:
    """Sampled, not greedy: random weights repeat one token when asked for the best, which may have no text."""
    command = [sys.executable, "-m", "sglang.bench_serving", "--backend", "sglang", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--model", str(model), "--dataset-name", "custom", "--dataset-path", str(dataset), "--num-prompts", str(count)]
    command += ["--request-rate", f"{rate:g}", "--seed", "1", "--temperature", "1.0", "--disable-tqdm", "--output-file", str(out)]
    return command


def client_environment(work: Path) -> dict[str, str]:
    """bench_serving imports Hugging Face's `datasets` for data that it does not use here; where that is missing, a stand-in serves."""
    if importlib.util.find_spec("datasets") is not None:
        return dict(os.environ)
    folder = work / "stand_ins"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "datasets.py").write_text(STAND_IN)
    return os.environ | {"PYTHONPATH": os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(folder)])}


def longest_s(rate: float, count: int) -> float:
    """Longer runs mean that the queue grew."""
    return 1.5 * count / rate + 10


def judge(result: Mapping[str, Any], rate: float, count: int, tpot_ms: float) -> str | None:
    """Why this rate is not held, or None. A queue that grows shows in the time to drain, not in TPOT."""
    if result["completed"] < count:
        return f"{result['completed']} of {count} requests completed"
    if result["p99_tpot_ms"] > tpot_ms:
        return f"P99 TPOT {result['p99_tpot_ms']:.1f} ms"
    if result["duration"] > longest_s(rate, count):
        return f"{result['duration']:.0f} s for arrivals of {count / rate:.0f} s"
    return None


def search_rate(
    server: GpuServer, name: str, settings: Settings, figures: dict[str, Any], save: Callable[[], None], *, seconds: float
) -> None:
    """Doubles the rate until it is not held, then halves the interval twice. Equal arrivals and lengths for every server."""
    deadline = time.monotonic() + seconds
    held, broken, rate = 0.0, None, (0.5 if settings.dry else 1.0) * settings.num_gpus
    bisections = 0
    while broken is None or bisections < BISECTIONS:
        left = deadline - time.monotonic()
        if left < LEAST_RATE_S:
            figures["notes"][f"{name}, open"] = f"search stopped after {seconds:.0f} s"
            break
        try:
            why = try_rate(server, name, rate, settings, figures, seconds=left)
        except OutOfTime as error:
            figures["notes"][f"{name}, open"] = str(error)
            break
        save()
        bisections += broken is not None
        held, broken = (rate, broken) if why is None else (held, rate)
        rate = 2 * rate if broken is None else (held + broken) / 2
    if not held and broken is None:
        return
    figures["rows"].append(
        {"what": "e2 highest rate", "server": name, "tpot_limit_ms": settings.tpot_ms, "requests_per_s": held, "not_held_at": broken}
    )


def placed_degrees(work: Path) -> list[int]:
    """Degree of every request that our server of real prefills has placed so far."""
    path = work / PLACEMENTS
    lines = path.read_text().splitlines() if path.is_file() else []
    return [len(entry["placement"][1]) for entry in map(json.loads, lines) if "placement" in entry]


def try_rate(server: GpuServer, name: str, rate: float, settings: Settings, figures: dict[str, Any], *, seconds: float) -> str | None:
    count = round(min(600, max(8 if settings.dry else 32, rate * settings.rate_seconds)))
    out, dataset = settings.work / f"bench_{name}_{rate:g}.jsonl", settings.work / f"arrivals_{count}.jsonl"
    mean_tokens = write_dataset(dataset, count, 400 if settings.dry else TRACE_LONGEST)
    out.unlink(missing_ok=True)
    server.client.flush_cache()
    placed_before = len(placed_degrees(settings.work))
    command = bench_command(server.port, server.model_path, dataset, rate, count, out)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False, env=client_environment(settings.work))
    except subprocess.TimeoutExpired as error:
        if seconds < longest_s(rate, count) + CLIENT_START_S:
            raise OutOfTime(f"search stopped: {rate:g} requests/s had {seconds:.0f} s only") from error
        return f"not done after {seconds:.0f} s"
    if done.returncode != 0 or not out.is_file():
        raise PartFailed(f"bench_serving ended with {done.returncode}: {done.stderr[-600:]}")
    result = json.loads(out.read_text().splitlines()[-1])
    degrees = Counter(placed_degrees(settings.work)[placed_before:])
    keys = ("completed", "duration", "concurrency", "mean_tpot_ms", "p99_tpot_ms", "mean_ttft_ms", "p99_ttft_ms", "output_throughput")
    entry = {"server": name, "rate": rate, "requests": count, "mean_tokens": mean_tokens} | {key: result[key] for key in keys}
    entry["degrees"] = {str(degree): count for degree, count in sorted(degrees.items())} if server.dyncp else None
    entry["not_held"] = judge(result, rate, count, settings.tpot_ms)
    figures["open"].append(entry)
    shown = {key: round(result[key], 2) for key in ("mean_tpot_ms", "p99_tpot_ms", "p99_ttft_ms", "output_throughput")}
    figures["rows"].append({"what": "e2 open", "server": name, "requests_per_s": rate} | shown | {"not_held": entry["not_held"]})
    return entry["not_held"]
