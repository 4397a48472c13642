"""The comparison, in parts of some minutes, resumable: what a file has already is not measured again.

    python -m benchmark.headline.run OUT_DIR --contenders stock,whole,ours --long 0.03,weka --rates 4,6,8/1,2 --seed 1,2 --history-ms 20

Writes OUT_DIR/headline.json after every rate. One server at a time, so that nobody shares the GPUs; contenders of equal flags share one,
and for each mix, seed and rate all of them are measured one after the other, with equal arrivals.

With --history-ms a window begins with the requests that would still run had the arrivals begun long before, and ends in time: what streams
then is cut off. Without it, it begins empty and lasts until every answer has come.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from benchmark.headline.contenders import NO_PREFILL, REAL_PREFILL, Contender, by_server, contenders
from benchmark.headline.measure import build_server, measure, warm_up
from benchmark.headline.plan import Unit, is_left, parse_mixes, parse_seeds, units
from benchmark.headline.predict import add_predictions
from benchmark.headline.traffic import mix_name
from benchmark.multi_gpu.servers import GpuServer, running
from benchmark.multi_gpu.settings import read_device_facts, set_environment
from benchmark.serving.provenance import provenance
from testing.machine_lock import machine_lock
from testing.ports import find_free_port

STOP_TTFT_S = 30.0
BETWEEN_WINDOWS_S = 10.0
"""To draw prompts, close streams and see the server empty."""
FIXED = ("model", "layers", "pool_tokens", "longest", "longest_output", "prefill", "seconds", "history_ms", "machine", "commit")
"""What may not differ between the points of a file."""


def seconds_of_point(args: argparse.Namespace) -> float:
    return args.seconds + BETWEEN_WINDOWS_S if args.history_ms else 1.6 * args.seconds


def stop_ttft_s(args: argparse.Namespace) -> float:
    """Nobody waits longer than a window that ends in time."""
    return min(STOP_TTFT_S, args.seconds / 2) if args.history_ms else STOP_TTFT_S


def run_group(group: Sequence[Contender], args: argparse.Namespace, cases: dict[str, Any], save: Callable[[], None]) -> None:
    """What of these contenders is not in `cases` ("mix|seed" -> contender -> case), on one server."""
    left = [unit for unit in units(group, args.mixes, args.seeds) if is_left(cases, unit, args.stop_ms, stop_ttft_s(args))]
    if not left:
        return
    if time.monotonic() > args.ends - seconds_of_point(args) - 60:
        print(f"no time left for {', '.join(one.name for one in group)}", flush=True)
        return
    server = build_server(group[0], args)
    try:
        with running(server, args.out, find_free_port(), min(args.ends, time.monotonic() + args.start_limit)):
            print(server.name, f"ready after {server.ready_s:.0f} s", flush=True)
            for contender in dict.fromkeys(unit.contender.name for unit in left):
                warm_up(server, next(one for one in group if one.name == contender), args)
            measure_units(server, left, args, cases, save)
    except (RuntimeError, OSError) as error:
        case_of(cases, left[0], server.name).setdefault("notes", []).append(f"{type(error).__name__}: {error}"[:1500])
        print(server.name, f"{type(error).__name__}: {error}"[:1500], flush=True)
    finally:
        save()


def case_of(cases: dict[str, Any], unit: Unit, server_name: str) -> dict[str, Any]:
    """The unit's case, begun where there is none."""
    one = unit.contender
    facts = {"what": one.what, "flags": list(one.flags), "fields": one.fields, "server": server_name}
    return cases.setdefault(unit.case_key, {}).setdefault(one.name, {**facts, "points": []})


def measure_units(
    server: GpuServer, left: Sequence[Unit], args: argparse.Namespace, cases: dict[str, Any], save: Callable[[], None]
) -> None:
    """One point after the other, until the time is over; no higher rate of a contender for which one was too much. Each is saved as it
    is found."""
    for unit in left:
        if not is_left(cases, unit, args.stop_ms, stop_ttft_s(args)):
            continue
        case = case_of(cases, unit, server.name)
        if time.monotonic() > args.ends - seconds_of_point(args):
            case.setdefault("notes", []).append(f"no time left for {unit.rate:g} requests/s")
            print(unit.contender.name, unit.case_key, case["notes"][-1], flush=True)
            return
        began = time.monotonic()
        found = measure(server, unit, args)
        case["points"].append(found)
        print(unit.contender.name, unit.case_key, f"{time.monotonic() - began:.1f} s", json.dumps(found), flush=True)
        save()


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--contenders", default="stock,whole,ours", help="names of contenders.py; servers start in this order")
    parser.add_argument("--long", default="0.03", help="mixes: shares of long prompts, or weka for the lengths of coding agents")
    parser.add_argument("--rates", default="4,6,8,10,12", help="requests per second; between mixes a slash, or the same for all")
    parser.add_argument("--seconds", type=float, default=45.0, help="of arrivals at one rate")
    parser.add_argument("--history-ms", type=float, default=0.0, help="per token, by which earlier requests have aged; 0: begin empty")
    parser.add_argument("--seed", default="1", help="one or several, with commas")
    parser.add_argument("--real-prefill", action="store_true", help="prompts are computed; without it K/V are what the pools hold")
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--model", default="qwen3-30b-a3b")
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--pool", type=int, default=786_432, help="KV tokens per instance")
    parser.add_argument("--longest", type=int, default=400_000, help="longest prompt, so that one pool holds it")
    parser.add_argument("--longest-output", type=int, default=4096)
    parser.add_argument("--stop-ms", type=float, default=150.0, help="higher rates are not tried beyond this P99 TPOT")
    parser.add_argument("--start-limit", type=float, default=300.0)
    parser.add_argument("--end", type=float, default=540.0, help="seconds for everything")
    parser.add_argument("--dry", action="store_true", help="the tiny test model on a CPU: shows that it runs, its times mean nothing")
    parser.add_argument("--no-prediction", action="store_true", help="benchmark.headline.predict adds them where time is cheap")
    parser.add_argument("--commit", help="what is measured, where git cannot tell")
    args = parser.parse_args(arguments)
    args.mixes, args.seeds = parse_mixes(args.long, args.rates), parse_seeds(args.seed)
    args.prefill = REAL_PREFILL if args.real_prefill else NO_PREFILL
    known = contenders(args.gpus, args.prefill)
    if unknown := [name for name in args.contenders.split(",") if name not in known]:
        parser.error(f"--contenders {unknown[0]}: there are {', '.join(known)}")
    args.groups = by_server(known[name] for name in args.contenders.split(","))
    return args


def load_or_begin(path: Path, args: argparse.Namespace) -> dict[str, Any]:
    """The file with this run's facts. ValueError where its points were measured under others."""
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {"cases": {}}
    facts = provenance(" ".join(["python", "-m", "benchmark.headline.run", *sys.argv[1:]]))
    facts |= {"model": args.model, "layers": args.layers, "pool_tokens": args.pool, "longest": args.longest}
    facts |= {"longest_output": args.longest_output, "prefill": args.prefill, "seconds": args.seconds, "history_ms": args.history_ms}
    facts["commit"] = args.commit or facts["commit"]
    if not args.dry:
        facts["machine"] = f"{args.gpus} x {read_device_facts()['names'][0]}"
    for key in FIXED:
        if found["cases"] and found.get(key) != facts[key]:
            raise ValueError(f"{path}: {key} is {found.get(key)} there, {facts[key]} now; take another folder")
    earlier = [*found.get("earlier_commands", []), *(found[key] for key in ("command",) if key in found)]
    return found | facts | ({"earlier_commands": earlier} if earlier else {})


def main() -> int:
    args = parse()
    args.ends = time.monotonic() + args.end
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "headline.json"
    if not args.dry:
        set_environment()
    found = load_or_begin(path, args)
    print("mixes", ", ".join(mix_name(some.mix) for some in args.mixes), "servers", [[one.name for one in some] for some in args.groups])
    with machine_lock() if args.dry else nullcontext():
        for group in args.groups:
            run_group(group, args, found["cases"], lambda: path.write_text(json.dumps(found, indent=1)))
    if not args.dry and not args.no_prediction:
        add_predictions(found)
        path.write_text(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
