"""Figures that explain a ratio: by limit, by definition of latency, by tail of the prompts, by part of the policy, by constant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmark.simulate.explain import PUBLISHED_P99, PUBLISHED_RATE
from benchmark.simulate.plots import colour, pyplot, save
from benchmark.simulate.summary import BUCKETS, LIMIT_KEYS, ORACLE, OURS

LIMIT_COLOURS = {"p99-60": "#9a031e", "p99-75": "#c58b2a", "p99-100": "#30638e"}


def plot_explanations(data: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Draws every figure whose cases are there; returns the numbers by name of the JSON file."""
    plot_gain(data["gain_by_limit"], folder / "gain.png")
    plot_p99_ratio(data["p99_ratio"], folder / "p99_ratio.png")
    drawn = {
        "gain": {"over_the_best": data["gain_by_limit"], "over_each": data["over_each_baseline"], "elsewhere": data["gain_elsewhere"]},
        "oracle_with_exchange": data["oracle_with_exchange"],
        "prefill_same": data["prefill_same"],
        "p99_ratio": data["p99_ratio"],
    }
    variants = {**data["ablation"], **data["moves"], **data["baselines"]}
    if variants:
        plot_variants(variants, folder / "ablation.png")
        drawn["ablation"] = variants
    if data["sensitivity"]:
        plot_sensitivity(data["sensitivity"], folder / "sensitivity.png")
        drawn["sensitivity"] = data["sensitivity"]
    return drawn


def _limit_ms(name: str) -> float:
    return float(name.split("-")[1])


def plot_gain(by_workload: dict[str, Any], path: Path) -> None:
    """Rate over the best data-parallel baseline against the limit, with the published range; nothing can be above the oracle."""
    plt = pyplot()
    figure, axes = plt.subplots(1, len(by_workload), figsize=(3.2 * len(by_workload), 3.6), sharey=True, squeeze=False)
    for axis, (workload, by_limit) in zip(axes[0], by_workload.items(), strict=True):
        axis.axhspan(*PUBLISHED_RATE, color="#bbbbbb", alpha=0.35, linewidth=0, label="published range")
        for shift, policy in enumerate((OURS, BUCKETS, ORACLE)):
            limits = sorted((limit for limit in by_limit if limit.startswith("p99") and policy in by_limit[limit]), key=_limit_ms)
            rows = [(_limit_ms(limit), by_limit[limit][policy]) for limit in limits if by_limit[limit][policy]["mean"] is not None]
            axis.errorbar(
                [limit + 0.7 * (shift - 1) for limit, _ in rows],
                [row["mean"] for _, row in rows],
                yerr=[row["half_width"] or 0.0 for _, row in rows],
                fmt="o-",
                markersize=4,
                capsize=2,
                color=colour(policy),
                label=policy,
            )
        axis.axhline(1.0, color="black", linewidth=0.8)
        axis.set(title=workload, xlabel="limit on the P99 TPOT (ms)", yscale="log", ylim=(0.8, 14))
        axis.set_yticks([1, 2, 3, 5, 10], ["1x", "2x", "3x", "5x", "10x"])
        axis.minorticks_off()
    axes[0][0].set_ylabel("rate over the best data-parallel one")
    axes[0][-1].legend(fontsize=7)
    save(figure, path)


def plot_p99_ratio(by_workload: dict[str, Any], path: Path) -> None:
    """P99 of data parallelism over ours against the rate, with and without waiting, with the published range."""
    plt = pyplot()
    figure, axes = plt.subplots(1, len(by_workload), figsize=(3.2 * len(by_workload), 3.6), sharey=True, squeeze=False)
    for axis, (workload, by_definition) in zip(axes[0], by_workload.items(), strict=True):
        axis.axhspan(*PUBLISHED_P99, color="#bbbbbb", alpha=0.35, linewidth=0, label="published range")
        for key, rows in by_definition.items():
            definition, baseline = key.split("|")
            if definition.endswith("per token") or not rows:
                continue
            axis.errorbar(
                [rate for rate, _ in rows],
                [row["mean"] for _, row in rows],
                yerr=[row["half_width"] or 0.0 for _, row in rows],
                fmt="o-" if "arrival" in definition else "s--",
                markersize=3,
                capsize=1.5,
                linewidth=1.0,
                color=colour(baseline),
                label=f"{baseline}, {definition.split(',')[0]}",
            )
        axis.axhline(1.0, color="black", linewidth=0.8)
        axis.set(title=workload, xlabel="requests/s", ylim=(0.8, 4.0))
    axes[0][0].set_ylabel("P99 latency per token over ours")
    axes[0][0].legend(fontsize=6.5)
    save(figure, path)


def plot_variants(rows: dict[str, Any], path: Path) -> None:
    """Highest rate of each variant and baseline over that of dual-balance."""
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(8.5, 0.42 * len(rows) + 1.2))
    for shift, limit in enumerate(LIMIT_KEYS):
        held = [row.get(limit) or {} for row in rows.values()]
        axis.barh(
            [k + 0.26 * (shift - 1) for k in range(len(rows))],
            [row.get("mean") or 0.0 for row in held],
            0.25,
            xerr=[row.get("half_width") or 0.0 for row in held],
            color=LIMIT_COLOURS[limit],
            label=f"P99 TPOT <= {limit.removeprefix('p99-')} ms",
            error_kw={"elinewidth": 0.8},
        )
    names = [f"{key.split('|')[1]}  ({key.split('|')[0]}, {max(row['seeds'] for row in value.values())} s.)" for key, value in rows.items()]
    axis.set_yticks(range(len(rows)), names, fontsize=8)
    axis.invert_yaxis()
    axis.axvline(1.0, color="black", linewidth=0.8)
    axis.set_xlim(0, 1.15)
    axis.set_xlabel("highest rate over that of dual-balance (s.: seeds)")
    axis.legend(fontsize=8, loc="lower right")
    save(figure, path)


def plot_sensitivity(rows: dict[str, Any], path: Path) -> None:
    """Gain with each constant at 0.7 and 1.3 of its value, beside the unscaled one."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(10, 0.34 * len(rows) + 1.4), sharey=True)
    panels = (("over_local_least_batch", "rate over local-least-batch"), ("over_length_buckets", "rate over length-buckets"))
    for axis, (key, title) in zip(axes, panels, strict=True):
        for shift, limit in enumerate(("p99-60", "p99-75")):
            held = [(row.get(limit) or {}).get(key) or {} for row in rows.values()]
            axis.barh(
                [k + 0.38 * (shift - 0.5) for k in range(len(rows))],
                [row.get("mean") or 0.0 for row in held],
                0.36,
                xerr=[row.get("half_width") or 0.0 for row in held],
                error_kw={"elinewidth": 0.8},
                color=LIMIT_COLOURS[limit],
                label=f"{_limit_ms(limit):g} ms",
            )
        axis.axvline(1.0, color="black", linewidth=0.8)
        axis.set_xlabel(title + " (chat-1pct)")
    axes[0].set_yticks(range(len(rows)), [name.replace("x0.7", "  -30 %").replace("x1.3", "  +30 %") for name in rows], fontsize=8)
    axes[0].invert_yaxis()
    axes[0].set_xscale("log")
    axes[0].set_xlim(0.9, 20)
    axes[0].set_xticks([1, 2, 3, 5, 10, 20], ["1", "2", "3", "5", "10", "20"])
    axes[0].minorticks_off()
    axes[1].set_xlim(0.9, 1.3)
    axes[0].legend(fontsize=8, title="limit (no bar: not simulated)", title_fontsize=8, loc="lower right")
    save(figure, path)
