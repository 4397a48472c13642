"""docs/results/several_gpus.md: the parts of scripts/multi_gpu_report.py on four and on two GPUs."""

from __future__ import annotations

from typing import Any

from scripts.result_pages.markdown import load, notes, page, source, table

LOAD_COLUMNS = ("what", "server", "load", "step or mean TPOT, ms", "P99 TPOT, ms", "KV max over mean", "largest degree")


def render() -> str:
    four, deepep, nodes = load("multi_gpu_4.json"), load("multi_gpu_deepep.json"), load("nodes.json")
    figures = {name: part["figures"]["rows"] for name, part in four["parts"].items()}
    return page(
        "Several GPUs, measured",
        source("multi_gpu_4.json", four),
        "How to read each part: [multi_gpu.md](../multi_gpu.md).",
        "## (a) One exchange of a layer",
        "Microseconds in a CUDA graph, every home's rows over all GPUs; NanoCP's constants beside them.",
        table(["shape", "rows per home", "`peer`", "NCCL", "NanoCP, 15.8 us + bytes at 361 GB/s"], _exchanges(figures["a"])),
        "## (b) Tokens against stock",
        table(["model", "degree", "equal within bounds", "tokens compared", "mean difference", "P99 difference"], _tokens(figures["b"])),
        "## (d) Step of one long request, ms",
        table(["server", "tokens", "degree", "step", "steps as sharded graphs"], _steps(figures["d"])),
        "## (e) Many requests",
        table(LOAD_COLUMNS, _loads(figures["e"])),
        "## (c) DeepEP",
        source("multi_gpu_deepep.json", deepep),
        table(["degree", "equal within bounds", "step, ms", "stock's, ms"], _deepep(deepep["parts"]["c"]["figures"]["rows"])),
        "## Two nodes of two instances, on one GPU",
        source("nodes.json", nodes),
        notes(nodes["notes"]),
        f"Sharded decode steps that ran as graphs: {nodes['sharded_graph_share']:g}. No instance opened memory of the other node.",
        table(["exchange of a layer, us", "one node", "both at once", "ratio"], _nodes(nodes["exchange"])),
    )


def _nodes(exchange: dict[str, Any]) -> list[tuple[Any, ...]]:
    return [(name.upper(), row["exchange_2_us"], row["exchange_2x2_us"], row["exchange_2x2_over_2"]) for name, row in exchange.items()]


def _exchanges(rows: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    cases: dict[tuple[str, int], dict[str, dict[str, Any]]] = {}
    for row in rows:
        if row["pattern"] == "every home":
            cases.setdefault((row["shape"], row["rows"]), {})[row["transport"]] = row
    lines = []
    for (shape, count), found in cases.items():
        measured = [round(found[name]["graph_us"], 1) if name in found else None for name in ("peer", "nccl")]
        lines.append((shape, count, *measured, _nanocp(found)))
    return lines


def _nanocp(found: dict[str, dict[str, Any]]) -> float:
    return round(next(iter(found.values()))["nanocp_us"], 1)


def _tokens(rows: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [(row["model"], row["degree"], _yes(row["equal"]), row["compared_tokens"], *_differences(row)) for row in rows]


def _differences(row: dict[str, Any]) -> tuple[str, str]:
    return f"{row['mean_difference']:.4f}", f"{row['p99_difference']:.3f}"


def _steps(rows: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    lines = []
    for row in rows:
        if row.get("step_ms"):
            graphs = _count(row["sharded_graph_steps"])
            lines.append((row["server"], f"{row['tokens']:,}", row["degree"], f"{row['step_ms']:.2f}", graphs))
    return lines


def _loads(rows: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    lines: list[tuple[Any, ...]] = []
    for row in rows:
        if row["what"] == "e1 closed":
            balance = f"{row['kv_max_over_mean']:.2f}"
            lines.append((row["what"], row["server"], row["population"], f"{row['step_ms']:.2f}", None, balance, row["largest_degree"]))
        elif row["what"] == "e2 open":
            rate = f"{row['requests_per_s']:g} requests/s"
            lines.append((row["what"], row["server"], rate, f"{row['mean_tpot_ms']:.2f}", f"{row['p99_tpot_ms']:.1f}", None, None))
    return lines


def _deepep(rows: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [(row["degree"], _yes(row["equal"]), f"{row['step_ms']:.2f}", f"{row['stock_step_ms']:.2f}") for row in rows]


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _count(value: float | None) -> int | None:
    return None if value is None else int(value)
