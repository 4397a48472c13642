"""The table that `sglang-dcp calibrate --measure` writes, and a cost model file made of it for the measured model. Pure Python."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from sglang_dcp.policy.attention_table import BFLOAT16, KV_DTYPES, table_constants
from sglang_dcp.policy.calibration import AttentionFit, Measurement
from sglang_dcp.policy.cost_model import CostModel, read_constants
from sglang_dcp.policy.served_model import ServedModel, nearest_constants, served_cost

NOT_CONSTANTS = ("name", "num_instances", "num_layers", "gpus_per_node", "pool_tokens")
FEWEST_GPUS = (2, 4)
"""Sizes that a file is made for beside those that its base tabulates."""


@dataclass(frozen=True, slots=True)
class CalibrationTable:
    """Attention of one served model on one card: the kernel's times, what they belong to, and how long all of it took."""

    model: str
    served: ServedModel
    rows: tuple[Measurement, ...] = ()
    seconds: float = 0.0

    def shape(self) -> dict[str, Any]:
        """As table_constants is asked, beside the card."""
        served = self.served
        return {"latent": served.latent, "num_heads": served.num_heads, "kv_bytes": served.kv_width, "kv_dtype": served.kv_dtype}

    def as_json(self) -> str:
        """With the entries that benchmark/kernels/measured.py reads beside `served`."""
        found = {"card": self.served.card, "model": self.model, "seconds": round(self.seconds, 1), **self.shape()}
        return json.dumps({**found, "served": asdict(self.served), "rows": [asdict(row) for row in self.rows]}, indent=1) + "\n"

    @classmethod
    def read(cls, path: Path) -> CalibrationTable:
        """Raises ValueError naming the file and what is missing or wrong."""
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            rows = tuple(Measurement(**row) for row in found["rows"])
            return cls(found["model"], ServedModel(**found["served"]), rows, found["seconds"])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: no table of sglang-dcp calibrate --measure: {type(error).__name__}: {error}") from error


def model_file(table: CalibrationTable, fit: AttentionFit, base: str | None, source: str) -> dict[str, Any]:
    """A cost model file for --dyncp-cost-model: the measured attention, under its element type; all else as a server takes it for this
    model and card, from the constants `base` or the nearest that ship."""
    name = base or nearest_constants(table.served)
    _, data = read_constants(name)
    # Constants of a file are bfloat16's; another element type replaces what was measured with it.
    served = replace(table.served, kv_element_bytes=KV_DTYPES[BFLOAT16], kv_bytes_per_token=table.served.kv_width)
    models = {size: served_cost(base, served, size).model for size in sorted({*FEWEST_GPUS, *map(int, data["expert_parallel"])})}
    first: CostModel = next(iter(models.values()))
    of_size = next(iter(data["expert_parallel"].values()))
    names = [field.name for field in fields(CostModel) if field.name not in (*NOT_CONSTANTS, *of_size)]
    constants: dict[str, Any] = {key: {"value": getattr(first, key), "source": f"as a server takes it from {name}"} for key in names}
    values = {"attention_fixed_us": fit.fixed_us, "attention_us_per_token": fit.us_per_token, "attention_us_per_row": fit.us_per_row}
    measured = {key: {"value": round(value, 8), "source": source} for key, value in values.items()}
    kv_dtypes = dict(data.get("kv_dtypes", {})) if base else {}
    if table.served.kv_dtype == BFLOAT16:
        constants |= measured
    else:
        kv_dtypes[table.served.kv_dtype] = measured
    return {
        "model": table.model,
        "gpu": served.card,
        "shape": f"{served.num_layers} layers, hidden {served.hidden_size}, {served.num_heads} heads",
        "num_layers": served.num_layers,
        "kv_bytes_per_token_layer": served.kv_width,
        "gpus_per_node": first.gpus_per_node,
        "constants": constants,
        "kv_dtypes": kv_dtypes,
        "expert_parallel": {str(size): {key: getattr(model, key) for key in of_size} for size, model in models.items()},
        "expert_parallel_source": f"as a server takes them from {name}",
    }


def shipped_error(table: CalibrationTable) -> float | None:
    """Largest relative error of the card's constants that ship on the table's rows; None where there are none."""
    shipped = table_constants(table.served.card, **table.shape())
    if not shipped:
        return None
    fixed, per_token, per_row = (shipped[key] for key in ("attention_fixed_us", "attention_us_per_token", "attention_us_per_row"))
    errors = [(fixed + per_token * row.tokens + per_row * row.requests) / row.microseconds - 1 for row in table.rows]
    return max(errors, key=abs)


def worst(fit: AttentionFit, rows: Sequence[Measurement]) -> str:
    """The row that the fit misses most, in words."""
    error, row = max(zip(fit.errors, rows, strict=True), key=lambda pair: abs(pair[0]))
    beside = f", one of {row.longest_row}" if row.longest_row else ""
    return f"{100 * error:+.1f} % at {row.requests} rows of {row.tokens_per_request} tokens{beside}"
