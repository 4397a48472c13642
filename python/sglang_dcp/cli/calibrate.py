"""`sglang-dcp calibrate`: fits the cost model's attention constants to kernel times, measured on this GPU or read from a table."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from sglang_dcp.cli.values import above_zero, refuse_given
from sglang_dcp.policy.attention_table import BFLOAT16, KV_DTYPES
from sglang_dcp.policy.calibration import AttentionFit, Measurement, fit_attention, read_measurements
from sglang_dcp.policy.calibration_table import CalibrationTable, model_file, shipped_error, worst
from sglang_dcp.policy.cost_model import DATA_FOLDER, load_cost_model, read_constants
from sglang_dcp.policy.served_model import ServedModel

DEFAULT_TABLE = DATA_FOLDER / "measurements_h100_flashinfer.csv"
LEAST_ROWS = 6
LIMIT_S = 100.0
OF_A_MEASUREMENT = ("config", "kv_dtype", "attention_backend", "limit")
BACKENDS = ("fa3", "flashinfer", "flashmla")
SERVED_KERNELS = {
    (False, False): ("fa3", "flashinfer"),
    (False, True): ("fa3", "flashinfer"),
    (True, False): ("flashinfer", "flashmla"),
    (True, True): ("flashmla",),
}
"""By (MLA, FP8 K/V); the first is what a server runs where nobody names one."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the command."""
    parser.add_argument(
        "table",
        nargs="?",
        type=Path,
        default=DEFAULT_TABLE,
        help="CSV: model,requests,tokens_per_request,microseconds[,longest_row,captured_rows]; or the JSON that --measure wrote",
    )
    parser.add_argument("--measure", type=Path, metavar="TABLE.json", help="time the kernels on this GPU, write them, then fit")
    parser.add_argument("--config", type=Path, help="with --measure: config.json of the served model")
    parser.add_argument("--kv-dtype", choices=list(KV_DTYPES), help=f"with --measure: as --kv-cache-dtype (default {BFLOAT16})")
    kernels = "with --measure: as --attention-backend (default: as a server's)"
    parser.add_argument("--attention-backend", choices=list(BACKENDS), help=kernels)
    parser.add_argument("--limit", type=above_zero, help=f"with --measure: begin no kernel after so many seconds (default {LIMIT_S:g})")
    parser.add_argument("--model", help="fit the rows of this model only (default: every model of the table)")
    parser.add_argument("--with-rows", action="store_true", help="fit a cost per attention row of a CSV too")
    parser.add_argument("--max-error", type=above_zero, default=0.15, help="exit 1 when a measurement is missed by more (default 0.15)")
    parser.add_argument("--base", help="cost model file or name to take all other constants from (default: as a server does)")
    parser.add_argument("--out", type=Path, help="write a cost model file for --dyncp-cost-model (of a CSV: needs --model and --base)")


def run(args: argparse.Namespace) -> int:
    """Prints the fit of each model; returns 1 when an error is beyond the limit, 2 for bad input or no GPU to measure on."""
    try:
        if args.measure is not None:
            args.table = _measure(args)
        else:
            refuse_given(args, OF_A_MEASUREMENT, "without --measure")
        largest = _fit_json(args) if args.table.suffix == ".json" else _fit_csv(args)
    except (OSError, RuntimeError, ValueError, AttributeError) as error:
        print(f"sglang-dcp calibrate: {error}", file=sys.stderr)
        return 2
    if largest > args.max_error:
        print(f"sglang-dcp calibrate: error {100 * largest:.1f} % exceeds --max-error {100 * args.max_error:.1f} %", file=sys.stderr)
        return 1
    return 0


# On this machine


def _measure(args: argparse.Namespace) -> Path:
    """Writes the table, also after every kernel, and returns its path."""
    if args.config is None:
        raise ValueError("--measure needs --config, the config.json of the model that will be served")
    began = time.monotonic()
    kv_dtype = args.kv_dtype or BFLOAT16
    served, head_dim, kv_heads = _read_config(args.config, _card_name(), kv_dtype)
    from sglang_dcp.dataflow.measure.decode_rows import DecodeShape, measure

    quantised = kv_dtype != BFLOAT16
    kernels = SERVED_KERNELS[served.latent, quantised]
    kernel = args.attention_backend or kernels[0]
    if kernel not in kernels:
        kind = "latent attention (MLA)" if served.latent else "grouped-query attention"
        raise ValueError(f"{args.config}: {kind} is not served with --attention-backend {kernel} and K/V in {kv_dtype}")
    shape = DecodeShape(served.num_heads, kv_heads, head_dim, served.latent, quantised, kernel)
    table = CalibrationTable(args.config.resolve().parent.name, served)
    for case, us in measure(shape, LIMIT_S if args.limit is None else args.limit):
        captured = case.requests + case.padding
        row = Measurement(table.model, case.requests, case.tokens_per_request, round(us, 2), case.longest_row, captured)
        table = replace(table, rows=(*table.rows, row), seconds=time.monotonic() - began)
        args.measure.write_text(table.as_json(), encoding="utf-8")
    print(f"{len(table.rows)} kernels on {served.device} in {table.seconds:.0f} s: {args.measure}")
    return args.measure


def _card_name() -> str:
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError(
            "--measure times attention kernels on a Hopper GPU, and torch sees no GPU here; "
            "measure on the machine that will serve, or fit a table from there: sglang-dcp calibrate TABLE.json"
        )
    if torch.cuda.get_device_capability()[0] != 9:
        raise RuntimeError(f"--measure times the kernels of Hopper GPUs (H100, H200), and this is {torch.cuda.get_device_name()}")
    return torch.cuda.get_device_name()


def _read_config(path: Path, device: str, kv_dtype: str) -> tuple[ServedModel, int, int]:
    """(sizes, width of a head, K/V heads) of a Hugging Face configuration; of one with a text model inside, that one's."""
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    config = SimpleNamespace(**values.get("text_config", values))
    try:
        served = ServedModel.of_config(config, device, KV_DTYPES[kv_dtype])
    except AttributeError as error:
        raise ValueError(f"{path}: no configuration of a model that is served: {error}") from error
    heads = served.num_heads
    head_dim = getattr(config, "head_dim", None) or served.hidden_size // heads
    return served, head_dim, getattr(config, "num_key_value_heads", None) or heads


# Fits


def _fit_json(args: argparse.Namespace) -> float:
    table = CalibrationTable.read(args.table)
    if len(table.rows) < LEAST_ROWS:
        raise ValueError(f"{args.table}: {len(table.rows)} kernels are too few for a fit, which needs {LEAST_ROWS} (--limit)")
    fit = fit_attention(table.rows, with_rows=True)
    _print(f"{table.model} on {table.served.card}, K/V in {table.served.kv_dtype}", fit, table.rows)
    shipped = shipped_error(table)
    ships = "none of this attention ship" if shipped is None else f"those that ship miss by up to {100 * shipped:+.1f} %"
    print(f"  largest: {worst(fit, table.rows)}; constants: {ships}")
    if args.out:
        source = f"relative least squares of {args.table.name}, largest error {100 * fit.max_error:.1f} %"
        args.out.write_text(json.dumps(model_file(table, fit, args.base, source), indent=1) + "\n", encoding="utf-8")
        print(f"wrote {args.out}")
    return fit.max_error


def _fit_csv(args: argparse.Namespace) -> float:
    if args.out and not (args.model and args.base):
        raise ValueError("--out needs --model and --base")
    measurements = read_measurements(args.table)
    largest = 0.0
    for model in [args.model] if args.model else sorted({item.model for item in measurements}):
        chosen = [item for item in measurements if item.model == model]
        if not chosen:
            raise ValueError(f"{args.table}: no row of --model {model}; it has {', '.join(sorted({item.model for item in measurements}))}")
        fit = fit_attention(chosen, args.with_rows)
        largest = max(largest, fit.max_error)
        _print(model, fit, chosen)
        if args.out:
            _write(args.out, args.base, str(args.table), fit)
    return largest


def _print(name: str, fit: AttentionFit, rows: Sequence[Measurement]) -> None:
    print(
        f"{name}: {fit.fixed_us:.2f} us + {fit.us_per_token * 1e3:.4f} ns/token + {fit.us_per_row:.3f} us/row, "
        f"largest error {100 * fit.max_error:.1f} %"
    )
    for item, error in zip(rows, fit.errors, strict=True):
        longest = f", one of {item.longest_row}" if item.longest_row else ""
        size = f"{item.requests:4d} x {item.tokens_per_request:7d} tokens{longest}"
        print(f"  {size:40} {item.microseconds:8.1f} us  {100 * error:+5.1f} %")


def _write(out: Path, base: str, table: str, fit: AttentionFit) -> None:
    load_cost_model(base, 1)  # names what is wrong with a file that is none
    _, data = read_constants(base)
    source = f"relative least squares of {table}"
    for key, value in (
        ("attention_fixed_us", fit.fixed_us),
        ("attention_us_per_token", fit.us_per_token),
        ("attention_us_per_row", fit.us_per_row),
    ):
        data["constants"][key] = {"value": value, "source": source}
    out.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {out}")
