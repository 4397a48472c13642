"""Requests sampled from ServeGen's published per-client statistics (alibaba/ServeGen, arXiv 2505.09999)."""

from __future__ import annotations

from pathlib import Path

import numpy as np

WINDOW_S = 600
LENGTH_WINDOW_S = 21_600


def sample_clients(folder: Path, seed: int = 7) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Arrival seconds, prompts and outputs of all deepseek-r1 clients in the busiest 600 s window, in order of arrival."""
    import pyarrow.compute
    import pyarrow.parquet

    rates = pyarrow.parquet.read_table(folder / "servegen_rates_dev.parquet").filter(pyarrow.compute.field("model") == "deepseek-r1")
    window = rates["t_s"].to_numpy()
    counts = rates["n_requests"].to_numpy().astype(float)
    busiest = max(np.unique(window).tolist(), key=lambda start: counts[window == start].sum())
    lengths = pyarrow.parquet.read_table(folder / "servegen_r1_length_pdf_dev.parquet")
    lengths = lengths.filter(pyarrow.compute.field("window_s") == busiest // LENGTH_WINDOW_S * LENGTH_WINDOW_S)
    client, tokens, prob = (lengths[name].to_numpy() for name in ("client", "tokens", "prob"))
    is_input = np.array(lengths["field"].to_pylist()) == "input_tokens"
    generator = np.random.default_rng(seed)
    parts = []
    for row in rates.filter(pyarrow.compute.field("t_s") == busiest).to_pylist():
        masks = [(client == row["client"]) & (is_input == wanted) for wanted in (True, False)]
        if not all(mask.any() for mask in masks):
            continue
        times = _renewal_stream(generator, row["pattern"], row["arg1"], row["arg2"])
        drawn = [generator.choice(tokens[mask], size=len(times), p=prob[mask] / prob[mask].sum()) for mask in masks]
        parts.append(np.stack([times, drawn[0], drawn[1]], axis=1))
    if not parts:
        raise ValueError(f"{folder}: no deepseek-r1 client has rates and length distributions for the window at {busiest} s")
    table = np.concatenate(parts)
    table = table[np.argsort(table[:, 0], kind="stable")]
    return table[:, 0], np.maximum(table[:, 1], 1).astype(np.int64), np.maximum(table[:, 2], 1).astype(np.int64)


def _renewal_stream(generator: np.random.Generator, pattern: str, shape: float, scale: float) -> np.ndarray:
    """Arrivals in [0, 600) of a Gamma or Weibull renewal process that has run for one window already."""
    mean = {"Gamma": lambda: shape * scale, "Weibull": lambda: scale * generator.weibull(shape, 4096).mean()}[pattern]()
    size = int(3 * 2 * WINDOW_S / max(mean, 1e-6)) + 64
    gaps = generator.gamma(shape, scale, size) if pattern == "Gamma" else scale * generator.weibull(shape, size)
    times = np.cumsum(gaps) - WINDOW_S
    return times[(times >= 0) & (times < WINDOW_S)]
