"""`python -m benchmark.simulate.figures`: every figure under docs/figures from the stored cases, as PNG and JSON.

Cases that are missing in benchmark/results are simulated only with --simulate (hours); the balance over time is simulated each time.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmark.simulate.experiments import GROUPS, run_group, run_seconds, run_sensitivity
from benchmark.simulate.plots import colour, plot_balance, pyplot, save
from benchmark.simulate.summary import LIMIT_KEYS, OURS, Cases, compare, load_cases
from benchmark.simulate.variants import Deployment, simulate
from benchmark.simulate.workloads import load_workload

FIGURES = Path(__file__).parents[2] / "docs" / "figures"
BALANCE_RATE = 45.0
BALANCE_POLICIES = ("dual-balance", "length-buckets", "local-least-batch", "local-least-kv")


def main() -> None:
    """Rebuilds all figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmark.simulate.figures", description=__doc__)
    parser.add_argument("--simulate", action="store_true", help="first simulate the cases that are missing")
    if parser.parse_args().simulate:
        for name in GROUPS:
            run_group(name)
        run_sensitivity()
    cases = load_cases(*(name for name in GROUPS if name != "tail"), "sensitivity")
    pairs = sorted({(deployment, workload) for deployment, workload, _, _ in cases})
    comparisons = {f"{deployment}|{workload}": compare(cases, deployment, workload) for deployment, workload in pairs}
    comparisons = {key: value for key, value in comparisons.items() if value}
    write_json("comparison.json", comparisons)
    main_label = Deployment().label()
    plot_rates({key.split("|")[1]: value for key, value in comparisons.items() if key.startswith(main_label + "|")})
    plot_latency_over_rate(cases, main_label)
    plot_degrees(cases, main_label)
    plot_variants(cases, main_label)
    plot_sensitivity(cases)
    plot_balance_over_time()


def write_json(name: str, data: Any) -> None:
    """Writes docs/figures/<name>."""
    FIGURES.mkdir(parents=True, exist_ok=True)
    (FIGURES / name).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def plot_rates(comparisons: dict[str, Any]) -> None:
    """Highest rate per workload and limit, with 95 % intervals over seeds."""
    plt = pyplot()
    figure, axes = plt.subplots(len(LIMIT_KEYS), 1, figsize=(9, 8), sharex=True)
    for axis, limit in zip(axes, LIMIT_KEYS, strict=True):
        policies = [*BALANCE_POLICIES, "oracle"]
        for shift, policy in enumerate(policies):
            rows = [comparison["max_rate"].get(policy, {}).get(limit, {}) for comparison in comparisons.values()]
            heights = [row.get("mean") or 0.0 for row in rows]
            errors = [row.get("half_width") or 0.0 for row in rows]
            places = [k + 0.16 * (shift - 2) for k in range(len(rows))]
            axis.bar(places, heights, 0.15, yerr=errors, label=policy, color=colour(policy), error_kw={"elinewidth": 0.8})
        axis.set_ylabel(f"requests/s, P99 <= {limit.removeprefix('p99-')} ms")
    axes[-1].set_xticks(range(len(comparisons)), list(comparisons))
    axes[0].legend(fontsize=8, ncols=3)
    save(figure, FIGURES / "max_rate.png")


def plot_latency_over_rate(cases: Cases, label: str) -> None:
    """P99 over requests of mean TPOT against the rate, chat + 1 %, seed 1."""
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(7, 4))
    data = {}
    for policy in (*BALANCE_POLICIES, "fixed-2", "fixed-4", "fixed-8", "oracle"):
        case = cases.get((label, "chat-1pct", policy, 1))
        if case is None:
            continue
        rows = sorted((float(rate), row["p99_tpot_ms"]) for rate, row in case["points"].items() if not row["unstable"])
        data[policy] = rows
        axis.plot([row[0] for row in rows], [row[1] for row in rows], "o-", label=policy, color=colour(policy), markersize=3)
    axis.set(xlabel="requests/s", ylabel="P99 over requests of mean TPOT (ms)", ylim=(40, 130))
    axis.legend(fontsize=8)
    save(figure, FIGURES / "p99_over_rate.png")
    write_json("p99_over_rate.json", data)


def plot_degrees(cases: Cases, label: str) -> None:
    """Share of requests per degree at the simulated rate next to the 75 ms limit."""
    plt = pyplot()
    workloads = [name for name in ("chat-1pct", "chat-5pct", "weka", "mooncake") if (label, name, OURS, 1) in cases]
    if not workloads:
        return
    figure, axes = plt.subplots(1, len(workloads), figsize=(3 * len(workloads), 3), sharey=True, squeeze=False)
    data: dict[str, Any] = {}
    for axis, workload in zip(axes[0], workloads, strict=True):
        for policy in (OURS, "length-buckets"):
            case = cases.get((label, workload, policy, 1))
            if case is None:
                continue
            target = case["max_rate"]["p99-75"]
            row = min(case["points"].items(), key=lambda item: abs(float(item[0]) - target))[1]
            shares = {int(k): v / row["num_finished"] for k, v in row["end_degrees"].items()}
            data[f"{workload}|{policy}"] = shares
            axis.plot(list(shares), list(shares.values()), "o-", color=colour(policy), label=policy)
        axis.set(title=workload, xlabel="degree at the end", yscale="log")
    axes[0][0].set_ylabel("share of requests")
    axes[0][0].legend(fontsize=7)
    save(figure, FIGURES / "degrees.png")
    write_json("degrees.json", data)


def plot_variants(cases: Cases, label: str) -> None:
    """Ablations: rate of each variant over the full policy, seed 1."""
    plt = pyplot()
    variants = GROUPS["ablation"]["policies"]
    data = {}
    for workload in GROUPS["ablation"]["workloads"]:
        full = cases.get((label, workload, OURS, 1))
        for variant in variants:
            case = cases.get((label, workload, variant, 1))
            if full and case:
                data[f"{workload}|{variant}"] = {
                    limit: round(case["max_rate"][limit] / full["max_rate"][limit], 4) for limit in LIMIT_KEYS if full["max_rate"][limit]
                }
    if not data:
        return
    figure, axis = plt.subplots(figsize=(8, 4.5))
    for shift, limit in enumerate(LIMIT_KEYS):
        values = [row.get(limit, 0.0) for row in data.values()]
        axis.barh([k + 0.26 * (shift - 1) for k in range(len(data))], values, 0.25, label=limit)
    axis.set_yticks(range(len(data)), [key.replace("|", "  ") for key in data], fontsize=8)
    axis.axvline(1.0, color="black", linewidth=0.8)
    axis.set_xlabel("highest rate over that of dual-balance")
    axis.legend(fontsize=8)
    save(figure, FIGURES / "ablation.png")
    write_json("ablation.json", data)


def plot_sensitivity(cases: Cases) -> None:
    """Gain at 75 ms on chat + 1 % with each constant at 0.7 and 1.3."""
    data: dict[str, dict[str, float]] = {}
    base = Deployment().label()
    for deployment in sorted({key[0] for key in cases if key[0].startswith(base + "-") and "x0.7" in key[0] or "x1.3" in key[0]}):
        rates = {p: cases.get((deployment, "chat-1pct", p, 1)) for p in ("dual-balance", "length-buckets", "local-least-batch")}
        if all(rates.values()):
            held = {policy: case["max_rate"]["p99-75"] for policy, case in rates.items() if case}
            if all(held.values()):
                data[deployment.removeprefix(base + "-")] = {
                    "over_local_least_batch": round(held["dual-balance"] / held["local-least-batch"], 4),
                    "over_length_buckets": round(held["dual-balance"] / held["length-buckets"], 4),
                }
    if not data:
        return
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(8, 4.5))
    for shift, key in enumerate(("over_local_least_batch", "over_length_buckets")):
        axis.barh([k + 0.4 * (shift - 0.5) for k in range(len(data))], [row[key] for row in data.values()], 0.38, label=key)
    axis.set_yticks(range(len(data)), list(data), fontsize=8)
    axis.axvline(1.0, color="black", linewidth=0.8)
    axis.set_xlabel("ratio of the highest rates at 75 ms")
    axis.legend(fontsize=8)
    save(figure, FIGURES / "sensitivity.png")
    write_json("sensitivity.json", data)


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
