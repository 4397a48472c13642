"""What attention costs on a card: constants fitted to our own kernel tables, by heads, K/V width and element type of the pools.

    us per layer = fixed + max(per token * tokens, per unsplit token * longest unsplit run of a row) + per row * rows

on one instance. The second term is FlashInfer's own schedule's; with ours (dataflow/attention/split_budget.py) long rows are split over all
multiprocessors, and it has none. `data/attention/<card>.json` holds the fits and where each comes from; docs/results/prices.md every
measured row beside them. `sglang-dcp calibrate` makes such constants for another card or shape.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

TABLE_FOLDER = Path(__file__).parent / "data" / "attention"
BFLOAT16, FP8 = "bfloat16", "fp8_e4m3"
KV_DTYPES = {BFLOAT16: 2, FP8: 1}
"""Bytes of an element of K/V, by the names that --kv-cache-dtype has for them."""
OUR_SPLIT, STOCK_SPLIT = "auto", "stock"
"""Who splits long rows, as --dyncp-split-budget says."""
CONSTANTS = ("attention_fixed_us", "attention_us_per_token", "attention_us_per_row", "attention_us_per_unsplit_token", "attention_chunks")


def table_constants(card: str, *, latent: bool, num_heads: int, kv_bytes: int, kv_dtype: str, split: str = OUR_SPLIT) -> dict[str, float]:
    """Constants of CostModel for attention of this shape; none where the card or the element type has no fit of this kind of attention.

    kv_bytes: K/V of a token and layer in bfloat16, whatever the pool holds. Of several shapes the nearest in size is taken and brought to
    it, the time of a token in proportion. Latent attention is bound by arithmetic or by bytes, as its heads are many or few: not scaled.
    Nor has it a split to choose.
    """
    asked = {"latent": latent, "kv_dtype": kv_dtype, "split": OUR_SPLIT if latent else split}
    fits = [fit for fit in _fits(card) if {name: fit[name] for name in asked} == asked]
    if latent:
        fits = [fit for fit in fits if fit["num_heads"] == num_heads]
    if not fits:
        return {}
    nearest = min(fits, key=lambda fit: (_ratio(fit["kv_bytes"], kv_bytes), _ratio(fit["num_heads"], num_heads)))
    found: dict[str, float] = {name: nearest[name] for name in CONSTANTS if name in nearest}
    found["attention_us_per_token"] *= kv_bytes / nearest["kv_bytes"]
    return found


@cache
def _fits(card: str) -> tuple[dict[str, Any], ...]:
    path = TABLE_FOLDER / f"{card}.json"
    return tuple(json.loads(path.read_text(encoding="utf-8"))["fits"]) if path.is_file() else ()


def _ratio(one: float, other: float) -> float:
    return max(one, other) / min(one, other)
