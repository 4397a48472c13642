"""Every attention kernel that was measured (benchmark/results), in one form; and the constants that ship, fitted to them.

python -m benchmark.kernels.measured        # writes python/sglang_dcp/policy/data/attention/<card>.json
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from sglang_dcp.policy.attention_table import BFLOAT16, FP8, OUR_SPLIT, STOCK_SPLIT, TABLE_FOLDER, table_constants
from sglang_dcp.policy.calibration import AttentionFit, Measurement, fit_attention
from sglang_dcp.policy.cost_model import InstanceWork, load_cost_model, unsplit_tokens

RESULTS = Path(__file__).resolve().parents[1] / "results"
HEAD_DIM, LATENT_BYTES = 128, 1152
WALL = 1.5
"""A kernel that takes so many times what its bytes take waits for one block."""


@dataclass(frozen=True)
class Shape:
    """Attention of one layer on one card, by one schedule. kv_bytes: of a token in bfloat16. split: who splits long rows."""

    card: str
    latent: bool
    num_heads: int
    kv_bytes: int
    kv_dtype: str
    split: str

    @property
    def name(self) -> str:
        heads = f"MLA {self.num_heads} heads" if self.latent else f"{self.num_heads}/{self.kv_bytes // 4 // HEAD_DIM} x {HEAD_DIM}"
        return f"{heads}, {self.kv_dtype}"

    @property
    def chunks(self) -> int:
        """Of a captured step of FlashInfer's own split: two thread blocks per multiprocessor of a Hopper GPU (split_budget.py)."""
        return 264 // (self.kv_bytes // 4 // HEAD_DIM)


@dataclass(frozen=True)
class Measured:
    shape: Shape
    source: str
    row: Measurement


def measured() -> Iterator[Measured]:
    """All of them, in the order of the result files."""
    yield from _of_split("split.json", "h200")
    yield from _of_kernels("kernels.json", "h100")
    yield from _of_quantised("fp8.json", "h200")
    for path in sorted(RESULTS.glob("attention_*.json")):
        yield from _of_calibration(path)


def _gqa(card: str, heads: int, kv_heads: int, split: str, kv_dtype: str = BFLOAT16) -> Shape:
    return Shape(card, False, heads, kv_heads * HEAD_DIM * 4, kv_dtype, split)


def _of_split(name: str, card: str) -> Iterator[Measured]:
    padding, short = 64, 1000
    for label, case in json.loads((RESULTS / name).read_text())["gqa"].items():
        heads, kv_heads = (int(part) for part in label.split(" ")[0].split("/"))
        for split, key in ((OUR_SPLIT, "shares 2"), (STOCK_SPLIT, "stock")):
            for rows, longest, us in _rows_and_longest(case["us"], key):
                row = Measurement(label, rows, short, us, longest, rows + padding)
                yield Measured(_gqa(card, heads, kv_heads, split), name, row)


def _rows_and_longest(table: dict[str, dict[str, float]], key: str) -> Iterator[tuple[int, int, float]]:
    for case, times in table.items():
        rows, longest = (int(number) for number in re.findall(r"\d+", case))
        yield rows, longest, times[key]


def _of_kernels(name: str, card: str) -> Iterator[Measured]:
    kinds = {
        r"GQA (\d+)/(\d+) x 128, (\d+) x (\d+), ours with LSE": lambda heads, kv_heads: _gqa(card, heads, kv_heads, OUR_SPLIT),
        r"MLA (\d+)( )heads, (\d+) x (\d+), FlashMLA": lambda heads, _: Shape(card, True, heads, LATENT_BYTES, BFLOAT16, OUR_SPLIT),
    }
    for line in json.loads((RESULTS / name).read_text())["table"]:
        for pattern, shape in kinds.items():
            found = re.fullmatch(pattern, line["kernel"])
            if found:
                heads, kv_heads, rows, tokens = (int(part.strip() or 0) for part in found.groups())
                yield Measured(shape(heads, kv_heads), name, Measurement(line["kernel"], rows, tokens, line["us"]))


def _of_quantised(name: str, card: str) -> Iterator[Measured]:
    """By the kernel that a server runs where nobody names one (fa3)."""
    rows, tokens = 32, 131_072
    shapes = {"qwen3-235b": (64, 4), "qwen3-30b": (32, 4), "64 heads, 8 K/V heads": (64, 8)}
    for label, case in json.loads((RESULTS / name).read_text())["default_attention"].items():
        if label in shapes:
            for key, kv_dtype in (("bfloat16", BFLOAT16), ("float8_e4m3fn", FP8)):
                times = sorted(case["us"][key])
                row = Measurement(label, rows, tokens, times[len(times) // 2])
                yield Measured(_gqa(card, *shapes[label], OUR_SPLIT, kv_dtype), name, row)


def _of_calibration(path: Path) -> Iterator[Measured]:
    """What `sglang-dcp calibrate --measure` wrote."""
    found = json.loads(path.read_text())
    shape = Shape(found["card"], found["latent"], found["num_heads"], found["kv_bytes"], found["kv_dtype"], OUR_SPLIT)
    for row in found["rows"]:
        yield Measured(shape, path.name, Measurement(**row))


def price_us(item: Measured) -> float:
    """A layer's attention as policy, simulator and `plan` price it, by the constants that ship."""
    shape = item.shape
    asked = {"latent": shape.latent, "num_heads": shape.num_heads, "kv_bytes": shape.kv_bytes, "kv_dtype": shape.kv_dtype}
    constants = table_constants(shape.card, **asked, split=shape.split)
    model = replace(load_cost_model("cpu", 1), **constants)
    return model.attention_fixed_us + model.attention_us(work_of(item.row))


def by_shape() -> dict[Shape, list[Measured]]:
    """Likewise, grouped."""
    groups: dict[Shape, list[Measured]] = {}
    for item in measured():
        groups.setdefault(item.shape, []).append(item)
    return groups


def fit_of(rows: list[Measured]) -> AttentionFit:
    """With a part per row where the table can tell it from the fixed part."""
    return fit_attention([item.row for item in rows], with_rows=len({item.row.requests for item in rows}) > 2)


def work_of(row: Measurement) -> InstanceWork:
    """As the cost model sees the kernel's rows."""
    longest = row.longest_row or row.tokens_per_request
    return InstanceWork(row.tokens, row.requests, 0, longest_row=longest, captured_rows=row.captured_rows)


def fits(card: str) -> list[dict[str, Any]]:
    """The card's constants, one entry per shape."""
    groups = by_shape()
    return [_entry(shape, rows, groups) for shape, rows in groups.items() if shape.card == card]


def _entry(shape: Shape, rows: list[Measured], groups: dict[Shape, list[Measured]]) -> dict[str, Any]:
    """An element type measured at one size alone, and FlashInfer's split, have the fixed part and the rows of bfloat16 and our split."""
    fit = fit_of(rows if shape.split == OUR_SPLIT and len(rows) > 1 else groups[replace(shape, kv_dtype=BFLOAT16, split=OUR_SPLIT)])
    per_token, unsplit, note = fit.us_per_token, {}, f"largest error {100 * fit.max_error:.1f} %"
    rest = [(item.row, item.row.microseconds - fit.fixed_us - fit.us_per_row * item.row.requests) for item in rows]
    if shape.split == STOCK_SPLIT:
        slow = [us / unsplit_tokens(work_of(row), shape.chunks) for row, us in rest if us > WALL * fit.us_per_token * row.tokens]
        unsplit = {"attention_us_per_unsplit_token": round(median(slow), 6), "attention_chunks": shape.chunks}
        note = f"median of {len(slow)} rows that are not split; all else as with our split"
    elif len(rows) == 1:
        per_token, note = rest[0][1] / rest[0][0].tokens, "fixed part and rows are bfloat16's"
    return {
        "latent": shape.latent,
        "num_heads": shape.num_heads,
        "kv_bytes": shape.kv_bytes,
        "kv_dtype": shape.kv_dtype,
        "split": shape.split,
        "attention_fixed_us": round(fit.fixed_us, 2),
        "attention_us_per_token": round(per_token, 8),
        "attention_us_per_row": round(fit.us_per_row, 4),
        **unsplit,
        "source": f"{len(rows)} sizes of benchmark/results/{', '.join(sorted({item.source for item in rows}))}; {note}",
    }


def table_text(card: str) -> str:
    return json.dumps({"card": card, "command": "python -m benchmark.kernels.measured", "fits": fits(card)}, indent=1) + "\n"


def main() -> None:
    for card in sorted({shape.card for shape in by_shape()}):
        path = TABLE_FOLDER / f"{card}.json"
        path.write_text(table_text(card))
        print(f"wrote {path.name}: {len(fits(card))} shapes")


if __name__ == "__main__":
    main()
