"""Real SGLang on a GPU with --enable-dyncp, against stock SGLang with one large pool: log-probabilities, growth, graphs, a short soak.

usage: python -m testing.gpu.runtime_check OUT_DIR [--limit SECONDS] [--only gqa,mla/gqa4,mla4/gqa_f32] [--device cpu]
Writes OUT_DIR/runtime_check.json after every stage, and one log per server. Exit code 0 when every stage of every case held.

bfloat16 is no exact arithmetic, so each sharded answer is compared twice: with stock, and with how far the *same* server is from stock
when it serves the same prompts unsharded, on SGLang's own path (several instances instead of one, other batches). See runtime_cases.py.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import re
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from testing.client import Answer
from testing.gpu.random_models import write_model
from testing.gpu.runtime_cases import BOUNDS, Case, build_servers, within_bounds
from testing.gpu.servers import GpuServer, start_all, stop_all, wait_ready
from testing.recall import MODELS

LARGEST_SHARE = 1.6
"""Most time of a wave, in even shares of what is left."""
FAILURES = (RuntimeError, OSError, AssertionError, ValueError, LookupError, http.client.HTTPException)


def prompt(length: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(256) for _ in range(length)]


def pinned(degree: int, home: int) -> dict[str, Any]:
    return {"custom_params": {"dyncp": {"degree": degree, "home": home}}, "ignore_eos": True}


def ask(server: GpuServer, ids: Sequence[int], new_tokens: int, pin: dict[str, Any] | None) -> Answer:
    sampling = pin or {"ignore_eos": True}
    return server.client.generate(ids, max_new_tokens=new_tokens, logprobs=True, sampling=sampling)


def differences(stock: Answer, ours: Answer, tie_gap: float = BOUNDS["tie_gap"]) -> dict[str, Any]:
    """Absolute differences of log-probability of all prompt tokens, and of output tokens up to the first that differs."""
    prompt_gaps = [abs(a.logprob - b.logprob) for a, b in zip(stock.prompt_tokens, ours.prompt_tokens, strict=True)]
    output_gaps, parted = [], None
    for place, (a, b) in enumerate(zip(stock.output_tokens, ours.output_tokens, strict=True)):
        if a.id != b.id:
            parted = {"place": place, "stock_gap": a.top_gap, "is_tie": a.top_gap is not None and a.top_gap < tie_gap}
            break
        output_gaps.append(abs(a.logprob - b.logprob))
    return {"prompt": prompt_gaps, "output": output_gaps, "parted": parted, "dyncp": ours.meta.get("dyncp")}


def summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    gaps = sorted(gap for result in results for part in ("prompt", "output") for gap in result[part])
    outputs = sorted(gap for result in results for gap in result["output"])

    def spread(values: list[float]) -> dict[str, float]:
        if not values:
            return {"count": 0, "mean": 0.0, "p99": 0.0, "max": 0.0}
        return {
            "count": len(values),
            "mean": sum(values) / len(values),
            "p99": values[min(len(values) - 1, int(0.99 * len(values)))],
            "max": values[-1],
        }

    parted = [result["parted"] for result in results if result["parted"]]
    return {
        "all": spread(gaps),
        "output": spread(outputs),
        "parted": parted,
        "parted_without_tie": sum(not entry["is_tie"] for entry in parted),
        "degrees": [(result["dyncp"] or {}).get("degree_end") for result in results],
    }


def step_counts(server: GpuServer) -> dict[str, float]:
    """Forward passes of all instances, as graphs and without."""
    text = server.client.metrics()
    counts = {}
    for kind in ("graph", "eager", "sharded_graph"):
        lines = re.findall(rf"^sglang:dyncp_{kind}_steps_total\{{.*?\}} (\S+)$", text, re.MULTILINE)
        counts[kind] = sum(float(value) for value in lines)
    return counts


class Check:
    """One server with dynamic context parallelism against one of stock. Stages run in order; a failed one does not stop the next."""

    def __init__(self, case: Case, ours: GpuServer, stock: GpuServer | None, save: Callable[[], None], only: Sequence[str] = ()) -> None:
        self.ours, self.stock, self.save, self.only, self.page_size = ours, stock, save, only, case.page_size
        self.sizes, self.bounds = case.sizes(ours.device), case.bounds(ours.device)
        self.result: dict[str, Any] = {"sizes": asdict(self.sizes), "bounds": dict(self.bounds), "stages": {}}
        self.prompts = [prompt(length, seed) for seed, length in enumerate(self.sizes.lengths)]
        self.base: dict[str, Any] = {}
        self._reference: dict[int, Answer] = {}

    def stages(self) -> Iterator[tuple[str, Callable[[], dict[str, Any]], bool]]:
        """(name, what runs, whether some of its decode steps with sharded rows must have run as graphs under peer memory)."""
        most = self.ours.instances
        yield "unsharded", self.unsharded, False
        for degree in range(2, most + 1):
            yield f"degree_{degree}", partial(self.sharded, degree), True
        yield f"degree_{most}_again", partial(self.sharded, most), True  # pages are others now
        for degree, length, new_tokens in self.sizes.growing:
            yield f"growth_from_{degree}", partial(self.growth, degree, length, new_tokens), True
        for pools, length in enumerate(self.sizes.longs, start=1):
            yield f"longer_than_{pools}_pool" + "s" * (pools > 1), partial(self.longer, pools, length), False
        yield "soak", self.soak, True
        yield "soak_unsharded", self.soak_unsharded, False
        yield "unsharded_again", self.unsharded_again, False

    def run(self) -> None:
        stages = {name: (stage, needs_graphs) for name, stage, needs_graphs in self.stages()}
        for number, name in enumerate(self.only or stages):
            stage, needs_graphs = stages[name]
            name = f"{name}, {number}" if self.only else name
            began, before = time.monotonic(), self._counts()
            entry: dict[str, Any] = {}
            try:
                entry |= stage()
            except FAILURES as error:
                entry |= {"ok": False, "error": f"{type(error).__name__}: {error}"[:1500]}
            after = self._counts()
            entry |= {
                "seconds": round(time.monotonic() - began, 2),
                "steps": {kind: after[kind] - before[kind] for kind in after if before},
            }
            if needs_graphs and self.ours.uses_peer_memory and not entry["steps"].get("sharded_graph"):
                entry |= {"ok": False, "error": entry.get("error", "no step with sharded rows ran as a graph")}
            self.result["stages"][name] = entry
            print(self.ours.name, name, json.dumps(entry)[:900], flush=True)
            self.save()
            if not self.ours.alive:
                return
        self.result["complete"] = True
        self.save()

    def _counts(self) -> dict[str, float]:
        time.sleep(0.3)  # counters are published ten times a second
        try:
            return step_counts(self.ours)
        except FAILURES:
            return {}

    # ---- what is asked and compared

    def reference(self, ids: list[int], new_tokens: int) -> Answer:
        key = hash((tuple(ids), new_tokens))
        if key not in self._reference:
            server, pin = (self.stock, None) if self.stock is not None else (self.ours, pinned(1, 0))
            self._reference[key] = ask(server, ids, new_tokens, pin)
        return self._reference[key]

    def _expected(self, job: tuple[list[int], int, dict[str, Any] | None], answer: Answer) -> Answer:
        """Without a stock server nothing tells what an answer should be that fits no pool: then itself."""
        ids, new_tokens, _ = job
        fits = self.stock is not None or len(ids) + new_tokens < self.sizes.pool
        return self.reference(ids, new_tokens) if fits else answer

    def _holds(self, found: dict[str, Any]) -> bool:
        return within_bounds(found, self.base, self.bounds)

    def _compare(self, jobs: Sequence[tuple[list[int], int, dict[str, Any] | None]], at_once: int) -> dict[str, Any]:
        """Summary over (prompt, new tokens, pin). Answers must be as long as asked for."""
        with ThreadPoolExecutor(at_once) as pool:
            answers = list(pool.map(lambda job: ask(self.ours, *job), jobs))
        # One at a time: the reference shall not depend on what else is in its batches.
        expected = [self._expected(job, answer) for job, answer in zip(jobs, answers, strict=True)]
        lengths = [len(answer.output_tokens) for answer in answers]
        if lengths != [job[1] for job in jobs]:
            raise ValueError(f"outputs of {lengths} tokens, asked for {[job[1] for job in jobs]}")
        found = [differences(a, b, self.bounds["tie_gap"]) for a, b in zip(expected, answers, strict=True)]
        for request, result in enumerate(found):
            if result["parted"]:
                result["parted"] |= {"request": request, "prompt_tokens": len(jobs[request][0])}
                if not result["parted"]["is_tie"]:
                    result["parted"] |= self._who_repeats(jobs[request], expected[request], answers[request], result["parted"]["place"])
        return summary(found)

    def _who_repeats(self, job: tuple[list[int], int, dict[str, Any] | None], stock: Answer, ours: Answer, place: int) -> dict[str, bool]:
        """Asks both servers once more, each alone: whoever does not repeat the token at `place` had it wrong."""
        ids, new_tokens, pin = job
        servers = {"ours": (self.ours, pin, ours), "stock": (self.stock, None, stock)}
        return {
            f"{name}_repeats": ask(server, ids, new_tokens, pin).output_tokens[place].id == first.output_tokens[place].id
            for name, (server, pin, first) in servers.items()
            if server is not None
        }

    def _compare_prompts(self, degree: int) -> dict[str, Any]:
        instances, new_tokens = self.ours.instances, self.sizes.new_tokens
        jobs = [(ids, new_tokens, pinned(degree, index % instances)) for index, ids in enumerate(self.prompts)]
        return self._compare(jobs, max(3, instances))

    # ---- stages

    def unsharded(self) -> dict[str, Any]:
        """Degree 1 at home: SGLang's own path, graphs included. What it differs from stock by is the measure for the rest."""
        self.base = self._compare_prompts(1)
        return {"ok": self._holds(self.base), **self.base}

    def sharded(self, degree: int) -> dict[str, Any]:
        found = self._compare_prompts(degree)
        return {"ok": self._holds(found) and set(found["degrees"]) == {degree}, **found}

    def growth(self, degree: int, length: int, new_tokens: int) -> dict[str, Any]:
        """The output does not fit where the prompt lies: one shard more."""
        found = self._compare([(prompt(length, 100 + degree), new_tokens, pinned(degree, 0))], 1)
        return {"ok": self._holds(found) and found["degrees"] == [degree + 1], **found}

    def longer(self, pools: int, length: int) -> dict[str, Any]:
        """A prompt longer than `pools` pools, placed as the router likes."""
        found = self._compare([(prompt(length, 110 + pools), self.sizes.new_tokens, None)], 1)
        return {"ok": self._holds(found) and (found["degrees"][0] or 0) > pools, **found}

    def soak(self, most_degree: int = 16) -> dict[str, Any]:
        """Requests of random length, degree and home, eight at a time: steps mix prefills, decodes and idleness."""
        rng, jobs = random.Random(5), []
        for index in range(self.sizes.soak_requests):
            length, new_tokens = rng.randrange(20, self.sizes.pool // 4), rng.randrange(1, self.sizes.soak_new_tokens)
            degree = min(rng.randint(1, self.ours.instances), most_degree, -(-length // self.page_size))
            jobs.append((prompt(length, 200 + index), new_tokens, pinned(degree, index % self.ours.instances)))
        found = self._compare(jobs, 8)
        return {"ok": self._holds(found) and self.ours.alive, "requests": len(jobs), **found}

    def soak_unsharded(self) -> dict[str, Any]:
        """The same requests on SGLang's own path: batches of it beside other processes on the GPU."""
        return self.soak(most_degree=1)

    def unsharded_again(self) -> dict[str, Any]:
        """The pool is whole and steps are graphs again."""
        found = self._compare_prompts(1)
        return {"ok": self._holds(found) and self.ours.alive, **found}


def case_holds(result: dict[str, Any]) -> bool:
    """Whether every stage of a case ran and held. result: of the report's `checks`."""
    return bool(result.get("complete")) and all(stage["ok"] for stage in result["stages"].values())


def write_models(cases: Sequence[Case], device: str) -> dict[str, Path]:
    """The model of each case, by case.stock_name."""
    if device == "cpu":
        folders = {"gqa": "qwen3moe", "mla": "deepseek_v2"}
        return {case.stock_name: MODELS / folders[case.model] for case in cases}
    folder = Path(tempfile.mkdtemp(prefix="dyncp_models_"))
    written: dict[tuple[str, int | None], Path] = {}
    for case in cases:
        key = (case.model, case.num_layers)
        written[key] = written.get(key) or write_model(case.model, folder, case.num_layers)
    return {case.stock_name: written[case.model, case.num_layers] for case in cases}


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
    end = time.monotonic() + args.limit
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the servers, which have sessions of their own, end with this process
    args.out.mkdir(parents=True, exist_ok=True)
    waves = [[Case.parse(name) for name in wave.split(",")] for wave in args.only.split("/")]
    cases = [case for wave in waves for case in wave]
    one_gpu = args.one_gpu and args.device == "cuda"
    pairs = build_servers(cases, write_models(cases, args.device), args.device, one_gpu=one_gpu, with_stock=not args.without_stock)
    only_stages = [name for name in args.stages.split(",") if name]
    report = Waves(waves, pairs, args.out, only_stages).run(end)
    held = {case.name: case_holds(report["checks"].get(case.name, {})) for case in cases}
    print("result", all(held.values()), held, os.fspath(args.out))
    return 0 if all(held.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
