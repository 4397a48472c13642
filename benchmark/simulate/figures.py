"""`python -m benchmark.simulate.figures`: every figure under docs/figures from the stored cases, as PNG and JSON.

Cases that are missing in benchmark/results are simulated only with --simulate (hours); the balance over time is simulated each time.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from benchmark.simulate.experiments import run_equal_rate, run_group, run_seconds, run_sensitivity
from benchmark.simulate.explain import FILES, explain
from benchmark.simulate.figures_explain import plot_explanations
from benchmark.simulate.groups import GROUPS
from benchmark.simulate.plots import colour, plot_balance, pyplot, save
from benchmark.simulate.summary import LIMIT_KEYS, OURS, Cases, compare, interval, load_cases, value_inside
from benchmark.simulate.variants import Deployment, simulate
from benchmark.simulate.workloads import load_workload

FIGURES = Path(__file__).parents[2] / "docs" / "figures"
BALANCE_RATE = 45.0
BALANCE_POLICIES = ("dual-balance", "length-buckets", "local-least-batch", "local-least-kv")


def main() -> None:
    """Rebuilds all figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmark.simulate.figures", description=__doc__)
    parser.add_argument("--simulate", action="store_true", help="first simulate the cases that are missing")
    parser.add_argument("--without-balance", action="store_true", help="leave out the one figure that needs new simulations")
    args = parser.parse_args()
    if args.simulate:
        for name in GROUPS:
            run_group(name)
        run_equal_rate()
        run_sensitivity()
    label = Deployment().label()
    bars = load_cases("bars")
    comparisons = all_comparisons()
    write_json("comparison.json", comparisons)
    plot_rates({workload: comparisons[f"bars|{label}|{workload}"] for workload in workloads_of(bars, label)})
    plot_latency_over_rate(bars, label)
    plot_degrees(bars, label)
    for name, data in plot_explanations(explain(), FIGURES).items():
        write_json(f"{name}.json", data)
    if not args.without_balance:
        plot_balance_over_time()


def workloads_of(cases: Cases, label: str) -> list[str]:
    """Workloads of a deployment that can be compared."""
    return [name for name in sorted({key[1] for key in cases if key[0] == label}) if compare(cases, label, name)]


def all_comparisons() -> dict[str, Any]:
    """Every stored file by file, deployment and workload."""
    found = {}
    for name in FILES:
        cases = load_cases(name)
        for deployment, workload in sorted({(key[0], key[1]) for key in cases}):
            found[f"{name}|{deployment}|{workload}"] = compare(cases, deployment, workload)
    return {key: value for key, value in found.items() if value}


def write_json(name: str, data: Any) -> None:
    """Writes docs/figures/<name>."""
    FIGURES.mkdir(parents=True, exist_ok=True)
    (FIGURES / name).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def plot_rates(comparisons: dict[str, Any]) -> None:
    """Highest rate per limit, one panel per workload (rates differ tenfold), with 95 % intervals over seeds."""
    plt = pyplot()
    columns = 3
    rows = -(-len(comparisons) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(11, 3.2 * rows), squeeze=False)
    policies = [*BALANCE_POLICIES, "oracle"]
    for axis, (workload, comparison) in zip(axes.flat, comparisons.items(), strict=False):
        for shift, policy in enumerate(policies):
            by_limit = [comparison["max_rate"].get(policy, {}).get(limit, {}) for limit in LIMIT_KEYS]
            axis.bar(
                [k + 0.16 * (shift - 2) for k in range(len(LIMIT_KEYS))],
                [row.get("mean") or 0.0 for row in by_limit],
                0.15,
                yerr=[row.get("half_width") or 0.0 for row in by_limit],
                label=policy,
                color=colour(policy),
                error_kw={"elinewidth": 0.9, "capsize": 1.5},
            )
        seeds = len(comparison["seeds"])
        axis.set_title(f"{workload} ({seeds} seed{'s' if seeds > 1 else ''})", fontsize=10)
        axis.set_xticks(range(len(LIMIT_KEYS)), [limit.removeprefix("p99-") for limit in LIMIT_KEYS])
        axis.set_ylim(0, None)
    for axis in axes[:, 0]:
        axis.set_ylabel("highest rate (requests/s)")
    for axis in axes[-1]:
        axis.set_xlabel("limit on the P99 TPOT (ms)")
    for axis in list(axes.flat)[len(comparisons) :]:
        axis.axis("off")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="upper center", ncols=len(policies), fontsize=9, frameon=False)
    save(figure, FIGURES / "max_rate.png", top=0.95)


def plot_latency_over_rate(cases: Cases, label: str) -> None:
    """P99 over requests of mean TPOT against the rate, chat + 1 %: mean over seeds and 95 % interval."""
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(8, 4.5))
    data: dict[str, Any] = {}
    for policy in (*BALANCE_POLICIES, "oracle"):
        of_seed = [case for key, case in sorted(cases.items()) if key[:3] == (label, "chat-1pct", policy)]
        rows = []
        for rate in range(16, 132, 4):
            values = [value for value in (value_inside(case, rate, "p99_tpot_ms") for case in of_seed) if math.isfinite(value)]
            # Where a seed's queue is unstable, a mean over the others would look better than it is.
            if len(values) == len(of_seed) > 1:
                rows.append((rate, interval(values)))
        if not rows:
            continue
        middle, half = np.array([row["mean"] for _, row in rows]), np.array([row["half_width"] for _, row in rows])
        axis.plot([rate for rate, _ in rows], middle, "-", label=policy, color=colour(policy))
        axis.fill_between([rate for rate, _ in rows], middle - half, middle + half, color=colour(policy), alpha=0.15, linewidth=0)
        data[policy] = [[rate, row["mean"], row["half_width"]] for rate, row in rows]
    for limit in (60, 75, 100):
        axis.axhline(limit, color="black", linewidth=0.7, linestyle=":")
    axis.set(xlabel="requests/s (chat + 1 % long prompts)", ylabel="P99 over requests of mean TPOT (ms)", ylim=(45, 125))
    axis.legend(fontsize=8, title="mean of five seeds, 95 % interval", title_fontsize=8)
    save(figure, FIGURES / "p99_over_rate.png")
    write_json("p99_over_rate.json", data)


def plot_degrees(cases: Cases, label: str) -> None:
    """Share of requests per degree at the simulated rate next to the 75 ms limit, mean over seeds."""
    plt = pyplot()
    workloads = [name for name in ("chat-1pct", "chat-5pct", "weka", "mooncake") if (label, name, OURS, 1) in cases]
    if not workloads:
        return
    figure, axes = plt.subplots(1, len(workloads), figsize=(3 * len(workloads), 3.2), sharey=True, squeeze=False)
    data: dict[str, Any] = {}
    for axis, workload in zip(axes[0], workloads, strict=True):
        for shift, policy in enumerate((OURS, "length-buckets")):
            shares = _degree_shares([case for key, case in cases.items() if key[:3] == (label, workload, policy)])
            data[f"{workload}|{policy}"] = shares
            axis.bar([k + 0.4 * (shift - 0.5) for k in shares], list(shares.values()), 0.4, color=colour(policy), label=policy)
        axis.set(title=workload, xlabel="shards at the end", yscale="log", ylim=(5e-5, 1.2), xticks=range(1, 9))
    axes[0][0].set_ylabel("share of requests")
    axes[0][-1].legend(fontsize=7)
    save(figure, FIGURES / "degrees.png")
    write_json("degrees.json", data)


def _degree_shares(of_seed: list[dict[str, Any]]) -> dict[int, float]:
    """Mean over seeds of the share of each degree."""
    totals: dict[int, float] = {}
    for case in of_seed:
        target = case["max_rate"]["p99-75"]
        row = min(case["points"].items(), key=lambda item: abs(float(item[0]) - target))[1]
        for degree, count in row["end_degrees"].items():
            totals[int(degree)] = totals.get(int(degree), 0.0) + count / row["num_finished"] / len(of_seed)
    return {degree: round(share, 6) for degree, share in sorted(totals.items())}


def plot_balance_over_time() -> None:
    """KV and batch of the hottest over the mean instance while chat + 1 % is served."""
    workload = load_workload("chat-1pct")
    seconds = run_seconds(BALANCE_RATE, workload.name)
    requests = workload.requests(BALANCE_RATE, seconds, 1)
    results = {policy: simulate(policy, Deployment(), workload, requests) for policy in BALANCE_POLICIES}
    plot_balance(results, FIGURES / "balance.png", (0.1 * seconds, seconds))
    write_json(
        "balance.json",
        {name: {"kv_balance": round(r.kv_balance, 3), "batch_balance": round(r.batch_balance, 3)} for name, r in results.items()},
    )


if __name__ == "__main__":
    main()
