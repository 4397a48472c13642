"""Part (c): SGLang's DeepEP dispatcher and dyncp in one server, against the same server of stock."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

from benchmark.multi_gpu.servers import ServerRefused, layered_server, serving, skip_or_fail
from benchmark.multi_gpu.settings import PartFailed, Settings, Skipped
from benchmark.multi_gpu.streams import stream

FLAGS = ("--moe-a2a-backend", "deepep")
LENGTH, NEW_TOKENS = 2000, 64


def run(settings: Settings, figures: dict[str, Any], save: Callable[[], None]) -> None:
    if settings.dry:
        raise Skipped("DeepEP needs GPUs")
    if importlib.util.find_spec("deep_ep") is None:
        raise Skipped("sgl-deep-ep is not installed")
    from runtime_check import pinned, prompt

    # Ours first: a refused setting costs seconds, and stock has nothing to be compared with then.
    ours = layered_server(settings, "c_dyncp", dyncp=True, pool=65536, flags=FLAGS, num_layers=2)
    try:
        with serving(settings, ours):
            for degree in range(1, settings.num_gpus + 1):
                answer = stream(ours.client, prompt(LENGTH, degree), NEW_TOKENS, pinned(degree, degree % settings.num_gpus))
                figures["rows"].append(row("dyncp", degree, answer.gaps(), answer.meta))
                save()
    except ServerRefused as error:
        raise skip_or_fail(error) from error
    stock = layered_server(settings, "c_stock", dyncp=False, pool=65536, flags=FLAGS, num_layers=2)
    try:
        with serving(settings, stock):
            answer = stream(stock.client, prompt(LENGTH, 1), NEW_TOKENS, {})
            figures["rows"].append(row("stock", 1, answer.gaps(), answer.meta))
    except ServerRefused as error:
        raise PartFailed(str(error)) from error
    wrong = [entry["degree"] for entry in figures["rows"] if entry["server"] == "dyncp" and entry["served_degree"] != entry["degree"]]
    if wrong:
        raise PartFailed(f"pinned degrees {wrong} were served at others")


def row(server: str, degree: int, gaps: list[float], meta: dict[str, Any]) -> dict[str, Any]:
    middle = sorted(gaps)[len(gaps) // 2]
    served = (meta.get("dyncp") or {}).get("degree_end")
    return {"server": server, "degree": degree, "served_degree": served, "step_ms": round(middle * 1000, 3)}
