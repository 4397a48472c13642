"""`sglang-dcp calibrate`: fits the cost model's attention constants to measured kernel times and reports the error."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from sglang_dcp.policy.calibration import fit_attention, read_measurements
from sglang_dcp.policy.cost_model import DATA_FOLDER

DEFAULT_TABLE = DATA_FOLDER / "measurements_h100_flashinfer.csv"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the command."""
    parser.add_argument("table", nargs="?", type=Path, default=DEFAULT_TABLE, help="CSV: model,requests,tokens_per_request,microseconds")
    parser.add_argument("--model", help="fit the rows of this model only (default: every model of the table)")
    parser.add_argument("--with-rows", action="store_true", help="fit a cost per attention row too")
    parser.add_argument("--max-error", type=float, default=0.10, help="exit 1 when a measurement is missed by more (default 0.10)")
    parser.add_argument("--base", help="cost model file or name to take all other constants from (with --out)")
    parser.add_argument("--out", type=Path, help="write a cost model file for --dyncp-cost-model (needs --model and --base)")


def run(args: argparse.Namespace) -> int:
    """Prints the fit of each model; returns 1 when an error is beyond the limit, 2 for bad input."""
    if args.out and not (args.model and args.base):
        print("sglang-dcp calibrate: --out needs --model and --base", file=sys.stderr)
        return 2
    try:
        measurements = read_measurements(args.table)
        models = [args.model] if args.model else sorted({item.model for item in measurements})
        worst = 0.0
        for model in models:
            chosen = [item for item in measurements if item.model == model]
            fit = fit_attention(chosen, args.with_rows)
            worst = max(worst, fit.max_error)
            print(
                f"{model}: {fit.fixed_us:.2f} us + {fit.us_per_token * 1e3:.4f} ns/token + {fit.us_per_row:.3f} us/row, "
                f"largest error {100 * fit.max_error:.1f} %"
            )
            for item, error in zip(chosen, fit.errors, strict=True):
                print(f"  {item.requests:4d} x {item.tokens_per_request:7d} tokens {item.microseconds:8.1f} us  {100 * error:+5.1f} %")
            if args.out:
                _write(args.out, args.base, str(args.table), fit.fixed_us, fit.us_per_token, fit.us_per_row)
    except (OSError, ValueError) as error:
        print(f"sglang-dcp calibrate: {error}", file=sys.stderr)
        return 2
    if worst > args.max_error:
        print(f"sglang-dcp calibrate: error {100 * worst:.1f} % exceeds --max-error {100 * args.max_error:.1f} %", file=sys.stderr)
        return 1
    return 0


def _write(out: Path, base: str, table: str, fixed_us: float, us_per_token: float, us_per_row: float) -> None:
    path = Path(base) if base.endswith(".json") else DATA_FOLDER / f"{base}.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    source = f"relative least squares of {table}"
    for key, value in (
        ("attention_fixed_us", fixed_us),
        ("attention_us_per_token", us_per_token),
        ("attention_us_per_row", us_per_row),
    ):
        data["constants"][key] = {"value": value, "source": source}
    out.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {out}")
