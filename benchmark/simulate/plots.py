"""Plots of one comparison. matplotlib is imported when a plot is asked for, so that simulations run without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmark.simulate.results import SimulationResult

COLOURS = {
    "dual-balance": "#0b6e4f",
    "length-buckets": "#d1495b",
    "local-least-batch": "#30638e",
    "local-least-kv": "#6ca6c1",
    "oracle": "#777777",
}
FALLBACK_COLOURS = ("#8d6a9f", "#c58b2a", "#4a4e69", "#9a031e", "#5f0f40", "#0f4c5c")


def pyplot() -> Any:
    """matplotlib.pyplot without a display. Raises ImportError naming the package to install."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install matplotlib, or pass --no-plots") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"figure.dpi": 110, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25})
    return plt


def colour(name: str) -> str:
    """One colour per policy in every figure."""
    return COLOURS.get(name) or FALLBACK_COLOURS[sum(map(ord, name)) % len(FALLBACK_COLOURS)]


def plot_run(results: dict[str, SimulationResult], rates: dict[str, float], out: Path, seconds: float) -> None:
    """max_rate.png, balance.png (max and mean of KV and batch over time) and degrees.png in `out`."""
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(6, 3))
    axis.barh(list(rates), list(rates.values()), color=[colour(name) for name in rates])
    axis.set_xlabel("highest rate under the limit (requests/s)")
    save(figure, out / "max_rate.png")
    plot_balance(results, out / "balance.png", (0.1 * seconds, seconds))
    figure, axis = plt.subplots(figsize=(6, 3))
    for name, result in results.items():
        degrees = sorted(result.end_degrees)
        total = sum(result.end_degrees.values()) or 1
        axis.plot(degrees, [result.end_degrees[k] / total for k in degrees], "o-", label=name, color=colour(name))
    axis.set(xlabel="degree at the end", ylabel="share of requests", yscale="log")
    axis.legend()
    save(figure, out / "degrees.png")


def plot_balance(results: dict[str, SimulationResult], path: Path, span: tuple[float, float] = (0.0, float("inf"))) -> None:
    """Hottest over mean instance over time, KV above and batch below, for the seconds in `span`."""
    plt = pyplot()
    figure, axes = plt.subplots(2, 1, figsize=(8, 5), sharex=True)
    for name, result in results.items():
        rows = [row for row in result.timeline if row[3] > 0 and row[5] > 0 and span[0] <= row[0] <= span[1]]
        for axis, top in zip(axes, (2, 4), strict=True):
            axis.plot([row[0] for row in rows], [row[top] / row[top + 1] for row in rows], label=name, color=colour(name), linewidth=0.9)
    axes[0].set(ylabel="KV tokens, max / mean", ylim=(1, None))
    axes[1].set(ylabel="batch, max / mean", xlabel="seconds", ylim=(1, None))
    axes[0].legend(fontsize=8, loc="upper right")
    save(figure, path)


def save(figure: Any, path: Path, top: float = 1.0) -> None:
    """Writes the figure without a date, so that equal results give equal files. What is above `top` is kept for a legend."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout(rect=(0.0, 0.0, 1.0, top))
    figure.savefig(path, metadata={"Software": None})
    pyplot().close(figure)
