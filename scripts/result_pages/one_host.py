"""docs/results/one_host.md: a served model with and without us on one host: answers, step time, host time, graphs."""

from __future__ import annotations

from typing import Any

from scripts.result_pages.markdown import load, notes, page, source, table

STAGES = ("unsharded", "degree_2", "degree_4", "growth_from_1", "longer_than_1_pool", "soak")


def render() -> str:
    runtime, checks, unused = load("gpu_runtime.json"), load("gpu_runtime_check.json"), load("unused.json")
    operate = load("operate.json")
    whole, *newer = checks["runs"][:5]
    return page(
        "One host, measured",
        "## Answers against stock, on a GPU",
        source("gpu_runtime_check.json", whole),
        "Mean difference of log-probabilities from stock SGLang with one large pool, per stage. The unsharded column is the yardstick.",
        table(["case", *STAGES], _differences(whole["checks"])),
        *(part for run in newer for part in _check(run)),
        "## Step time",
        source("gpu_runtime.json", runtime),
        table(["requests", "step, ms", "over stock", "95 % interval"], _steps(runtime["step_ms"])),
        "## Graphs",
        table(["", "stock", "with `--enable-dyncp`"], _graphs(runtime["graphs"])),
        "## Host time of our code in a step",
        f"Per instance, microseconds, p50. {runtime['host']['steady']['load']['home_rows']} home rows; rows begin a page in every step.",
        table(["steps", "all", "columns", "settle", "tables", "secure", "allocate"], _host(runtime)),
        "Two commits on one machine, worst instance. 775b857 is before the step had its driver, and before rows were split by our own "
        "budget. Both instances on one GPU, which runs them in turns, and two layers:",
        *_host_runs(runtime["host_before_after"]),
        "Where requests join and leave, tables are made anew and now take longer. The likely cause was read in the code and not measured: "
        "FlashInfer splits no row of so many, and needs no new plan; our budget splits them, and plans anew when rows join or leave.",
        "An instance on each GPU, 24 layers:",
        *_host_runs(runtime["host_before_after_two_gpus"]),
        "With SGLang's default kernel, `fa3`, which needs no plan from the host: three starts of one server, 24 layers.",
        *_host_runs(runtime["host_default_kernel"]),
        "## Without a sharded request, on a CPU",
        source("unused.json", unused),
        table(["paired step time over stock"], [(unused["step_time_ratio"],)]),
        "## When an instance is lost, on a CPU",
        source("operate.json", operate),
        "Killed: one of two instances, under eight open requests: streams, whole answers, a batch; sharded, waiting and sitting out. "
        "SIGTERM: with one open request.",
        table(["end", "times", "longest time to the last answer, s", "status of the answers", "exit code"], _ends(operate)),
        f"Left behind after {operate['starts']} starts (processes, shared memory, temporary files, port): "
        f"{', '.join(operate['left_behind']) or 'nothing'}.",
        notes(operate["notes"]),
    )


def _ends(operate: dict[str, Any]) -> list[tuple[Any, ...]]:
    def text(key: str) -> str:
        return ", ".join(map(str, operate[key]))

    killed = (len(operate["runs_s"]), operate["kill_to_last_answer_s"], text("statuses"), text("exit_codes_after_a_kill"))
    stopped = (operate["orderly_stops"], None, text("statuses_at_orderly_stops"), text("exit_codes_of_orderly_stops"))
    return [("killed", *killed), *([("SIGTERM", *stopped)] if operate["orderly_stops"] else [])]


def _differences(checks: dict[str, Any]) -> list[tuple[Any, ...]]:
    rows = []
    for case, check in sorted(checks.items()):
        stages = check["stages"]
        rows.append((f"`{case}`", *(_mean(stages.get(stage)) for stage in STAGES)))
    return rows


def _mean(stage: dict[str, Any] | None) -> str | None:
    return None if stage is None or "all" not in stage else f"{stage['all']['mean']:.2g}"


def _steps(steps: dict[str, Any]) -> list[tuple[Any, ...]]:
    names = {"stock_s0": "stock", "graph_s0": "none sharded", "graph_s16": "half of them sharded", "graph_s32": "all sharded"}
    rows = []
    for key, name in names.items():
        step = steps[key]
        span = f"{step['low']:.3f} to {step['high']:.3f}" if "ratio" in step else None
        rows.append((name, f"{step['median_ms']:.2f}", f"{step['ratio']:.3f}" if "ratio" in step else None, span))
    return rows


def _graphs(graphs: dict[str, Any]) -> list[tuple[Any, ...]]:
    stock, ours = graphs["stock"], graphs["graph"]
    return [
        ("graphs captured", stock["num_graphs"], ours["num_graphs"]),
        ("capture, s", stock["capture_s"], ours["capture_s"]),
        ("memory, GiB", stock["gib"], ours["gib"]),
        ("the same at 61 layers, GiB", None, ours["gib_61_layers"]),
    ]


def _worst(load: dict[str, Any]) -> dict[str, Any]:
    """Sharded steps of the instance that spends most on them."""
    return max((instance["sharded"] for instance in load["instances"]), key=lambda part: part["p50_us"])


def _host(runtime: dict[str, Any]) -> list[tuple[Any, ...]]:
    rows = []
    for layers, host in ((runtime["layers"], runtime["host"]), (4, runtime["host_4_layers"][0])):
        for kind, name in (("steady", "steady, sharded"), ("changing", "with joins and leaves")):
            worst = _worst(host[kind])
            parts = worst["parts_p50_us"]
            cells = [parts.get(part) for part in ("columns", "settle", "tables", "secure", "allocate")]
            rows.append((f"{layers} layers, {name}", worst["p50_us"], *cells))
    return rows


def _check(run: dict[str, Any]) -> list[str]:
    return [source("gpu_runtime_check.json", run), table(["case", *STAGES], _differences(run["checks"])), run["note"] + "."]


def _host_runs(sides: list[dict[str, Any]]) -> list[str]:
    head = ["commit, steps", "all", "p90", "columns", "settle", "tables", "new tables"]
    sources = dict.fromkeys(source("gpu_runtime.json", side) for side in sides)
    return [*sources, table(head, _sides(sides))]


def _sides(sides: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    rows = []
    for side in sides:
        for kind in ("steady", "changing"):
            worst = _worst(side["host"][kind])
            cells = [worst["parts_p50_us"].get(part) for part in ("columns", "settle", "tables", "new_tables")]
            rows.append((f"{side['commit']}, {kind}", worst["p50_us"], worst["p90_us"], *cells))
    return rows
