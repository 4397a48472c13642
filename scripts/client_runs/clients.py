"""One record per benchmark client: the package, the command, and where its report has the figures."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROMPT_TOKENS, OUTPUT_TOKENS = 60, 41
Figures = dict[str, float | None]


@dataclass(frozen=True)
class Load:
    """What every client is asked to send: `num_requests`, `concurrency` at a time, to `url`."""

    url: str
    model: str
    tokenizer: Path
    num_requests: int
    concurrency: int


@dataclass(frozen=True)
class Client:
    """`command(load, folder, bin)` is run in `folder`; `read(folder)` gives `completed`, `tpot_ms`, `itl_ms` (means) and `itl_p50_ms`.

    `package` is pinned; "" means that the client is part of the environment that this script runs in. `tpot`, `itl`: the client's names.
    `compare`: the figure of `read` that is time per token, to hold against a limit or a server.
    `python`: the oldest minor version of Python 3 that the package takes.
    """

    name: str
    package: str
    tpot: str
    itl: str
    compare: str
    command: Callable[[Load, Path, Path], list[str]]
    read: Callable[[Path], Figures]
    python: int = 11


def _bench_serving(load: Load, folder: Path, bin_folder: Path) -> list[str]:
    command = [str(bin_folder / "python"), "-m", "sglang.bench_serving", "--backend", "sglang-oai-chat", "--dataset-name", "random-ids"]
    command += ["--num-prompts", str(load.num_requests), "--max-concurrency", str(load.concurrency), "--random-range-ratio", "1"]
    command += ["--random-input-len", str(PROMPT_TOKENS), "--random-output-len", str(OUTPUT_TOKENS), "--base-url", load.url]
    return [*command, "--model", load.model, "--tokenizer", str(load.tokenizer), "--output-file", str(folder / "out.jsonl")]


def _read_bench_serving(folder: Path) -> Figures:
    run = json.loads((folder / "out.jsonl").read_text().splitlines()[-1])
    return {
        "completed": run["completed"],
        "tpot_ms": run["mean_tpot_ms"],
        "itl_ms": run["mean_itl_ms"],
        "itl_p50_ms": run["median_itl_ms"],
    }


def _guidellm(load: Load, folder: Path, bin_folder: Path) -> list[str]:
    return [
        str(bin_folder / "guidellm"),
        "run",
        *("--backend", f"kind=openai_http,target={load.url}"),
        *("--profile", f"kind=concurrent,streams={load.concurrency}"),
        *("--constraint", f"kind=max_requests,count={load.num_requests}"),
        *("--data", f"kind=synthetic_text,prompt_tokens={PROMPT_TOKENS},output_tokens={OUTPUT_TOKENS}"),
        *("--tokenizer", f"kind=huggingface_auto,model={load.tokenizer}"),
        *("--output", f"kind=json,path={folder / 'out.json'}"),
        "--disable-console-interactive",
    ]


def _read_guidellm(folder: Path) -> Figures:
    metrics = json.loads((folder / "out.json").read_text())["benchmarks"][0]["metrics"]
    itl = metrics["inter_token_latency_ms"]["successful"]
    tpot = metrics["time_per_output_token_ms"]["successful"]["mean"]
    return {"completed": metrics["request_totals"]["successful"], "tpot_ms": tpot, "itl_ms": itl["mean"], "itl_p50_ms": itl["median"]}


def _aiperf(load: Load, folder: Path, bin_folder: Path) -> list[str]:
    command = [str(bin_folder / "aiperf"), "profile", "--model", load.model, "--url", load.url, "--endpoint-type", "chat", "--streaming"]
    command += ["--tokenizer", str(load.tokenizer), "--request-count", str(load.num_requests), "--concurrency", str(load.concurrency)]
    command += ["--synthetic-input-tokens-mean", str(PROMPT_TOKENS), "--output-tokens-mean", str(OUTPUT_TOKENS)]
    command += ["--extra-inputs", "ignore_eos:true"]
    return [*command, "--ui", "none", "--artifact-dir", str(folder / "out")]


def _read_aiperf(folder: Path) -> Figures:
    report = json.loads((folder / "out" / "profile_export_aiperf.json").read_text())
    itl = report["inter_token_latency"]
    return {"completed": report["request_count"]["avg"], "tpot_ms": None, "itl_ms": itl["avg"], "itl_p50_ms": itl["p50"]}


def _evalscope(load: Load, folder: Path, bin_folder: Path) -> list[str]:
    command = [str(bin_folder / "evalscope"), "perf", "--url", f"{load.url}/v1/chat/completions", "--api", "openai", "--stream"]
    command += ["--model", load.model, "--parallel", str(load.concurrency), "--number", str(load.num_requests), "--dataset", "random"]
    command += ["--tokenizer-path", str(load.tokenizer), "--prefix-length", "0", "--outputs-dir", str(folder / "out"), "--no-timestamp"]
    command += ["--extra-args", json.dumps({"ignore_eos": True})]
    for name, value in (("prompt-length", PROMPT_TOKENS), ("tokens", OUTPUT_TOKENS)):
        command += [f"--min-{name}", str(value), f"--max-{name}", str(value)]
    return command


def _read_evalscope(folder: Path) -> Figures:
    (summary,) = folder.glob("out/**/benchmark_summary.json")
    report = json.loads(summary.read_text())
    rows = json.loads(summary.with_name("benchmark_percentile.json").read_text())
    median = next((row["ITL (ms)"] for row in rows if row["Percentiles"] == "50%"), None)
    figures = {"tpot_ms": report["Avg TPOT (ms)"], "itl_ms": report["Avg ITL (ms)"], "itl_p50_ms": median}
    return {"completed": report["Success Requests"]} | figures


def _inference_perf(load: Load, folder: Path, bin_folder: Path) -> list[str]:
    """It sends by rate: the number of requests in stages of 2 a second."""

    def exactly(tokens: int) -> Mapping[str, int]:
        return {"min": tokens, "max": tokens, "mean": tokens, "std_dev": 0, "total_count": load.num_requests}

    settings: dict[str, Any] = {
        "api": {"type": "completion", "streaming": True},
        "data": {"type": "random", "input_distribution": exactly(PROMPT_TOKENS), "output_distribution": exactly(OUTPUT_TOKENS)},
        "load": {"type": "constant", "stages": [{"rate": 2, "duration": load.num_requests // 2}], "num_workers": 1},
        "server": {"type": "vllm", "model_name": load.model, "base_url": load.url, "ignore_eos": True},
        "tokenizer": {"pretrained_model_name_or_path": str(load.tokenizer)},
        "report": {"request_lifecycle": {"summary": True, "per_stage": False, "per_request": False}},
        "storage": {"local_storage": {"path": str(folder / "out")}},
    }
    # JSON is YAML.
    (folder / "settings.yml").write_text(json.dumps(settings))
    return [str(bin_folder / "inference-perf"), "-c", str(folder / "settings.yml")]


def _read_inference_perf(folder: Path) -> Figures:
    successes = json.loads((folder / "out" / "summary_lifecycle_metrics.json").read_text())["successes"]
    latency = successes["latency"]
    itl = latency["inter_token_latency"]
    figures = {"tpot_ms": 1000 * latency["time_per_output_token"]["mean"], "itl_ms": 1000 * itl["mean"], "itl_p50_ms": 1000 * itl["median"]}
    return {"completed": successes["count"]} | figures


CLIENTS = (
    Client("sglang.bench_serving", "", "TPOT", "ITL", "tpot_ms", _bench_serving, _read_bench_serving),
    Client("guidellm", "guidellm==0.8.1", "Time per Output Token", "Inter Token Latency", "itl_ms", _guidellm, _read_guidellm),
    Client("aiperf", "aiperf==0.13.0", "(none)", "Inter Token Latency", "itl_ms", _aiperf, _read_aiperf),
    Client("evalscope", "evalscope[perf]==1.14.1", "Avg TPOT", "Avg ITL", "tpot_ms", _evalscope, _read_evalscope),
    Client(
        "inference-perf",
        "inference-perf==0.7.0",
        "time_per_output_token",
        "inter_token_latency",
        "tpot_ms",
        _inference_perf,
        _read_inference_perf,
        python=12,
    ),
)
