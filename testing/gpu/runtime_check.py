"""Real SGLang on a GPU with --enable-dyncp, against stock SGLang with one large pool: log-probabilities, growth, graphs, a short soak.

usage: python -m testing.gpu.runtime_check OUT_DIR [--limit SECONDS] [--only gqa,mla/gqa4,mla4/gqa_f32] [--device cpu]
Writes OUT_DIR/runtime_check.json after every stage, and one log per server. Exit code 0 when every stage of every case held.

bfloat16 is no exact arithmetic, so each sharded answer is compared twice: with stock, and with how far the *same* server is from stock
when it serves the same prompts unsharded, on SGLang's own path (several instances instead of one, other batches). See runtime_cases.py.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from testing.gpu.random_models import write_model
from testing.gpu.runtime_cases import Case, build_servers
from testing.gpu.servers import GpuServer, start_all, stop_all, wait_ready
from testing.gpu.stages import Check
from testing.machine_lock import machine_lock
from testing.recall import MODELS

LARGEST_SHARE = 1.6
"""Most time of a wave, in even shares of what is left."""


def case_holds(result: dict[str, Any]) -> bool:
    """Whether every stage of a case ran and held. result: of the report's `checks`."""
    return bool(result.get("complete")) and all(stage["ok"] for stage in result["stages"].values())


def write_models(cases: Sequence[Case], device: str) -> dict[str, Path]:
    """The model of each case, by case.stock_name."""
    trained = {"gqa": MODELS / "qwen3moe", "mla": MODELS / "deepseek_v2"} if device == "cpu" else {}
    folder = Path(tempfile.mkdtemp(prefix="dyncp_models_"))
    written: dict[tuple[str, int | None, int | None], Path] = {}
    for case in cases:
        known = written.get(case.shape) or trained.get(case.model)
        written[case.shape] = known or write_model(case.model, folder, case.num_layers, case.num_experts)
    return {case.stock_name: written[case.shape] for case in cases}


Pairs = dict[str, tuple[GpuServer, GpuServer | None]]


class Waves:
    """Serves and checks the cases of a wave side by side, one wave after the other; the servers of the next one start meanwhile."""

    def __init__(self, waves: list[list[Case]], pairs: Pairs, out: Path, only_stages: Sequence[str] = ()) -> None:
        self.waves, self.pairs, self.out, self.only_stages = waves, pairs, out, only_stages
        self.report: dict[str, Any] = {"checks": {}, "servers": {}}
        self.started: list[GpuServer] = []
        self.running: list[GpuServer] = []
        self._saving = threading.Lock()

    def servers_of(self, waves: list[list[Case]]) -> list[GpuServer]:
        return list({id(s): s for wave in waves for case in wave for s in self.pairs[case.name] if s is not None}.values())

    def save(self) -> None:
        with self._saving:
            self.report["servers"] = {s.name: {"ready_s": s.ready_s, "alive": s.alive} for s in self.started}
            # Without an indent a dict is encoded from a copy of its items: cases write into theirs meanwhile.
            settled = json.loads(json.dumps(self.report))
            (self.out / "runtime_check.json").write_text(json.dumps(settled, indent=1))

    def run(self, end: float) -> dict[str, Any]:
        """Until `end` (time.monotonic); a wave that hangs leaves the later ones some of it. Returns the report."""
        try:
            for index in range(len(self.waves)):
                now, left = time.monotonic(), len(self.waves) - index
                self._run_wave(index, min(end, now + LARGEST_SHARE * (end - now) / left))
        except BaseException:
            self.report["error"] = traceback.format_exc()[-3000:]
            raise
        finally:
            stop_all(self.running)
            self.save()
        return self.report

    def _start(self, wave: int) -> None:
        new = [server for server in self.servers_of(self.waves[wave : wave + 1]) if server not in self.started]
        first = len(self.started)
        self.started += new
        self.running += new
        start_all(new, self.out, first)

    def _run_wave(self, index: int, deadline: float) -> None:
        self._start(index)
        servers = self.servers_of([self.waves[index]])
        threads = [threading.Thread(target=self._check, args=(case, deadline), daemon=True) for case in self.waves[index]]
        for thread in threads:
            thread.start()
        is_next_started = False
        while any(thread.is_alive() for thread in threads) and time.monotonic() < deadline - 8:
            if not is_next_started and all(server.ready_s is not None or not server.alive for server in servers):
                self._start(index + 1)
                is_next_started = True
            time.sleep(0.25)
        if any(thread.is_alive() for thread in threads):
            self.report.setdefault("timed_out", []).extend(case.name for case in self.waves[index])
        for server in servers:
            if any(thread.is_alive() for thread in threads) or server.dyncp and server.ready_s is None:
                server.dump_stacks()
        later = self.servers_of(self.waves[index + 1 :])
        over = [server for server in servers if server not in later]
        stop_all(over)
        self.running = [server for server in self.running if server not in over]

    def _check(self, case: Case, deadline: float) -> None:
        ours, stock = self.pairs[case.name]
        pair = [server for server in (ours, stock) if server is not None]
        wait_ready(pair, deadline - 30)
        print(case.name, "ready", {server.name: server.ready_s for server in pair}, flush=True)
        if any(server.ready_s is None for server in pair):
            self.report["checks"][case.name] = {"stages": {}, "error": "a server did not become ready"}
            return
        check = Check(case, ours, stock, self.save, self.only_stages)
        self.report["checks"][case.name] = check.result
        check.run()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--limit", type=float, default=600.0, help="seconds for everything")
    parser.add_argument("--only", default="gqa,mla,gqa_gloo", help=f"cases; between waves a slash. {Case.__doc__}")
    parser.add_argument("--stages", default="", help="these stages alone, in this order, e.g. unsharded,soak,soak (all, each once)")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--without-stock", action="store_true", help="compare with the same server unsharded")
    parser.add_argument("--gpu-each", dest="one_gpu", action="store_false", help="one GPU per instance instead of one for all")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the servers, which have sessions of their own, end with this process
    args.out.mkdir(parents=True, exist_ok=True)
    waves = [[Case.parse(name) for name in wave.split(",")] for wave in args.only.split("/")]
    cases = [case for wave in waves for case in wave]
    one_gpu = args.one_gpu and args.device == "cuda"
    pairs = build_servers(cases, write_models(cases, args.device), args.device, one_gpu=one_gpu, with_stock=not args.without_stock)
    only_stages = [name for name in args.stages.split(",") if name]
    with machine_lock() if args.device == "cpu" else nullcontext():
        report = Waves(waves, pairs, args.out, only_stages).run(time.monotonic() + args.limit)
    held = {case.name: case_holds(report["checks"].get(case.name, {})) for case in cases}
    print("result", all(held.values()), held, os.fspath(args.out))
    return 0 if all(held.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
