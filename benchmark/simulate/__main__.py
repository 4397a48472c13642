"""`python -m benchmark.simulate`: what would this traffic gain, on how many GPUs?"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmark.simulate.experiments import point
from benchmark.simulate.rate_search import RateSearch
from benchmark.simulate.results import SimulationResult
from benchmark.simulate.traces import load_trace
from benchmark.simulate.variants import VARIANTS, Deployment, simulate
from benchmark.simulate.workloads import WORKLOADS, Workload, load_workload
from sglang_dcp.traces.flags import add_trace_flags

RESULT_KEYS = ("p50_tpot_ms", "p99_tpot_ms", "kv_balance", "batch_balance", "p99_wait_s", "start_degrees", "end_degrees")
COUNT_KEYS = {"num_retractions": "retractions", "num_growths": "growths", "num_rejected": "rejected"}


def build_parser() -> argparse.ArgumentParser:
    """Flags of the command."""
    parser = argparse.ArgumentParser(prog="python -m benchmark.simulate", description=__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    add_trace_flags(parser, source)
    source.add_argument("--workload", choices=sorted(WORKLOADS), help="a workload of the project instead of a trace")
    parser.add_argument("--model", default="deepseek-v3", help="deepseek-v3, kimi-k2 or qwen3-235b-a22b")
    parser.add_argument("--gpu", default="h200", help="h200 or h100")
    parser.add_argument("--instances", type=int, default=32)
    parser.add_argument("--pool-tokens", type=int, help="KV tokens per instance (default: from memory and weights)")
    parser.add_argument("--policy", action="append", choices=VARIANTS, help="repeat for several (default: dual-balance, local-least-kv)")
    parser.add_argument("--slo-ms", type=float, default=50.0, help="limit on the P99 over requests of mean TPOT (default 50)")
    parser.add_argument("--rate", type=float, help="requests/s of the measured run (default: the lowest max_rate of all policies)")
    parser.add_argument("--seconds", type=float, default=180.0, help="how long requests are sent in every run (default 180)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--prefill", choices=("elsewhere", "same"), default="elsewhere")
    parser.add_argument("--out", type=Path, required=True, help="folder for result.json and the plots")
    parser.add_argument("--no-plots", action="store_true")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Writes result.json and the plots; returns 2 for bad input."""
    args = build_parser().parse_args(arguments)
    trace = None
    try:
        if args.trace:
            trace, workload = load_trace(args.trace, args.trace_format, strict=args.strict)
            print("\n".join(trace.describe()))
        else:
            workload = load_workload(args.workload)
        deployment = Deployment(args.model, args.gpu, args.instances, args.pool_tokens)
        pool = deployment.pool()
    except (OSError, ValueError) as error:
        print(f"benchmark.simulate: {error}", file=sys.stderr)
        return 2
    policies = args.policy or ["dual-balance", "local-least-kv"]
    searches = {name: _search(args, deployment, workload, name) for name in policies}
    rates = {name: search.highest_rate(args.slo_ms) for name, search in searches.items()}
    rate = args.rate or min((value for value in rates.values() if value), default=1.0)
    report: dict[str, Any] = {
        "workload": workload.name,
        "deployment": deployment.label(),
        "pool_tokens": pool,
        "max_prompt": workload.max_prompt,
        "slo_ms": args.slo_ms,
        "rate": rate,
        "seed": args.seed,
        "policies": {},
    }
    if trace is not None:
        report["trace"] = {"format": trace.format, "requests": len(trace.requests), "skipped": len(trace.skipped), "tick_s": trace.tick_s}
    results = {name: searches[name].result_at(rate) for name in policies}
    for name, result in results.items():
        data = point(result)
        counts = {short: data[key] for key, short in COUNT_KEYS.items()}
        report["policies"][name] = {"max_rate": rates[name], **{key: data[key] for key in RESULT_KEYS}, **counts}
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "result.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if not args.no_plots:
        from benchmark.simulate.plots import plot_run

        plot_run(results, rates, args.out, args.seconds)
    for name, row in report["policies"].items():
        held = f"max {row['max_rate']:8.2f} requests/s under {args.slo_ms:g} ms"
        print(f"{name:20s} {held}; at {rate:.2f}: P99 TPOT {row['p99_tpot_ms']:.1f} ms")
    return 0


def _search(args: argparse.Namespace, deployment: Deployment, workload: Workload, name: str) -> RateSearch:
    def evaluate(rate: float) -> SimulationResult:
        requests = workload.requests(rate, args.seconds, args.seed)
        return simulate(name, deployment, workload, requests, progress=_progress(name, rate), prefill=args.prefill)

    return RateSearch(evaluate, args.rate or 20.0)


def _progress(name: str, rate: float):
    """A one-line bar on a terminal, nothing when the output is not one."""
    if not sys.stderr.isatty():
        return None

    def show(share: float) -> None:
        filled = round(30 * share)
        print(f"\r{name:20s} {rate:8.2f}/s [{'#' * filled}{'.' * (30 - filled)}]", end="", file=sys.stderr, flush=True)

    return show


if __name__ == "__main__":
    sys.exit(main())
