"""Part (d): one long request alone, decoded at every degree that is a power of two, and by stock SGLang."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from benchmark.multi_gpu.servers import (
    SYNTHETIC_VARIABLE,
    GpuServer,
    ServerRefused,
    has_synthetic_prefill,
    layered_server,
    serving,
)
from benchmark.multi_gpu.settings import PartFailed, Settings
from benchmark.multi_gpu.streams import stream

LENGTHS = (65_536, 262_144, 1_048_576)
LONGEST_REAL_PREFILL = 262_144
"""With few layers this takes seconds; a million tokens take minutes per degree."""
DRY_LENGTHS = (256, 512)
NEW_TOKENS = 64


def run(settings: Settings, figures: dict[str, Any], save: Callable[[], None]) -> None:
    settings.require_servers()
    synthetic = has_synthetic_prefill()
    figures |= {"num_layers": 2 if settings.dry else settings.num_layers, "synthetic_prefill": synthetic, "new_tokens": NEW_TOKENS}
    if not synthetic:
        reason = f"no synthetic prefill in this runtime ({SYNTHETIC_VARIABLE}); longer ones are left out"
        figures["notes"] = {"prefill": f"real, up to {LONGEST_REAL_PREFILL} tokens: {reason}"}
    longest = max(DRY_LENGTHS if settings.dry else LENGTHS if synthetic else LENGTHS[:2])
    pool = 1024 if settings.dry else longest + 8192
    for name, dyncp in (("stock", False), ("dyncp", True)):
        server = layered_server(settings, f"d_{name}", dyncp=dyncp, pool=pool)
        os.environ |= {SYNTHETIC_VARIABLE: "1"} if synthetic and dyncp else {}
        try:
            with serving(settings, server):
                measure(server, name, settings, figures, save)
        except ServerRefused as error:
            raise PartFailed(str(error)) from error
        finally:
            os.environ.pop(SYNTHETIC_VARIABLE, None)


def measure(server: GpuServer, name: str, settings: Settings, figures: dict[str, Any], save: Callable[[], None]) -> None:
    from runtime_check import pinned, prompt, step_counts

    degrees = [degree for degree in range(1, settings.num_gpus + 1) if degree & (degree - 1) == 0] if name == "dyncp" else [1]
    for length in DRY_LENGTHS if settings.dry else LENGTHS:
        for degree in degrees:
            entry: dict[str, Any] = {"server": name, "tokens": length, "degree": degree, "step_ms": None, "p90_ms": None}
            entry |= {"prefill_s": None, "graph_steps": None, "eager_steps": None, "reason": None}
            figures["rows"].append(entry)
            real = name == "stock" or not figures["synthetic_prefill"]
            if real and length > LONGEST_REAL_PREFILL:
                entry["reason"] = "needs a synthetic prefill"
                continue
            before = step_counts(server) if name == "dyncp" else {}
            answer = stream(server.client, prompt(length, 7), NEW_TOKENS, pinned(degree, 0) if name == "dyncp" else {})
            gaps = sorted(answer.gaps()[1:])
            entry |= {"step_ms": round(gaps[len(gaps) // 2] * 1000, 4), "p90_ms": round(gaps[int(0.9 * len(gaps))] * 1000, 4)}
            entry["prefill_s"] = round(answer.first_token_s, 3)
            served = (answer.meta.get("dyncp") or {"degree_end": 1})["degree_end"]
            if served != degree:
                raise PartFailed(f"{length} tokens pinned to degree {degree} were served at {served}")
            if before:
                after = step_counts(server)
                entry |= {f"{kind}_steps": after[kind] - before[kind] for kind in ("graph", "eager")}
            server.client.flush_cache()
            save()
