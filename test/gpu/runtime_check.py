"""Real SGLang on a GPU with --enable-dyncp, against stock SGLang with one large pool: log-probabilities, growth, graphs, a short soak.

usage: python test/gpu/runtime_check.py OUT_DIR [--limit SECONDS] [--only gqa,mla,...] [--device cpu]
Writes OUT_DIR/runtime_check.json after every stage, and one log per server. Exit code 0 when every stage of every pair held.

bfloat16 is no exact arithmetic, so each sharded answer is compared twice: with stock, and with how far the *same* server is from stock
when it serves the same prompts unsharded, on SGLang's own path (two instances instead of one, other batches). See BOUNDS.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import re
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "test"), str(ROOT / "test" / "gpu")]

from gpu_servers import GpuServer, start_all, stop_all, wait_ready  # noqa: E402
from random_models import MODELS, write_model  # noqa: E402

from support.client import Answer  # noqa: E402

FAILURES = (RuntimeError, OSError, AssertionError, ValueError, LookupError, http.client.HTTPException)


@dataclass(frozen=True)
class Sizes:
    """pool: of an instance. lengths: prompts that fit one. long: more than a pool. growing: a prompt that fits, with an output that does
    not."""

    pool: int
    lengths: tuple[int, ...]
    long: int
    growing: int
    growing_new: int
    soak_requests: int


SIZES = {
    "cuda": Sizes(4096, (40, 150, 333, 800, 1500, 2600, 3300), 6000, 4020, 120, 40),
    "cpu": Sizes(1024, (40, 150, 333, 800), 1500, 1000, 40, 10),
}
STAGES = ("unsharded", "sharded", "sharded_again", "growth", "longer_than_a_pool", "soak", "graphs_after")
GRAPH_STAGES = ("sharded", "sharded_again", "growth", "soak")
"""Stages whose sharded decode steps must run as graphs under the peer transport."""
KIND_FLAGS = {"flashmla": ("--attention-backend", "flashmla", "--page-size", "64")}
"""Kinds of a check that are no transport."""
NEW_TOKENS = 24
TIE_GAP = 0.25
"""Where stock's best two tokens are closer than this, bfloat16 may choose either."""
BOUNDS = {"mean_factor": 2.0, "mean_slack": 5e-3, "p99_factor": 2.0, "p99_slack": 5e-2}
"""sharded <= factor * unsharded + slack: a partial result is rounded to bfloat16 once more than an unsharded one."""


def prompt(length: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(256) for _ in range(length)]


def pinned(degree: int, home: int) -> dict[str, Any]:
    return {"custom_params": {"dyncp": {"degree": degree, "home": home}}, "ignore_eos": True}


def ask(server: GpuServer, ids: Sequence[int], new_tokens: int, pin: dict[str, Any] | None) -> Answer:
    sampling = pin or {"ignore_eos": True}
    return server.client.generate(ids, max_new_tokens=new_tokens, logprobs=True, sampling=sampling)


def differences(stock: Answer, ours: Answer) -> dict[str, Any]:
    """Absolute differences of log-probability of all prompt tokens, and of output tokens up to the first that differs."""
    prompt_gaps = [abs(a.logprob - b.logprob) for a, b in zip(stock.prompt_tokens, ours.prompt_tokens, strict=True)]
    output_gaps, parted = [], None
    for place, (a, b) in enumerate(zip(stock.output_tokens, ours.output_tokens, strict=True)):
        if a.id != b.id:
            parted = {"place": place, "stock_gap": a.top_gap, "is_tie": a.top_gap is not None and a.top_gap < TIE_GAP}
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


def within_bounds(sharded: dict[str, Any], unsharded: dict[str, Any]) -> bool:
    ours, base = sharded["all"], unsharded["all"]
    return bool(
        sharded["parted_without_tie"] == 0
        and ours["mean"] <= BOUNDS["mean_factor"] * base["mean"] + BOUNDS["mean_slack"]
        and ours["p99"] <= BOUNDS["p99_factor"] * base["p99"] + BOUNDS["p99_slack"]
    )


def step_counts(server: GpuServer) -> dict[str, float]:
    """Forward passes of all instances, as graphs and without."""
    text = server.client.metrics()
    counts = {}
    for kind in ("graph", "eager", "sharded_graph"):
        lines = re.findall(rf"^sglang:dyncp_{kind}_steps_total\{{.*?\}} (\S+)$", text, re.MULTILINE)
        counts[kind] = sum(float(value) for value in lines)
    return counts


class Check:
    """One server with dynamic context parallelism against one of stock. `stages` run in order; a failed one does not stop the next."""

    def __init__(self, ours: GpuServer, stock: GpuServer | None, save: Callable[[], None]) -> None:
        self.ours, self.stock, self.save = ours, stock, save
        self.result: dict[str, Any] = {"stages": {}}
        self.sizes = SIZES[ours.device]
        self.prompts = [prompt(length, seed) for seed, length in enumerate(self.sizes.lengths)]
        self._reference: dict[int, Answer] = {}

    def reference(self, ids: list[int], new_tokens: int) -> Answer:
        key = hash((tuple(ids), new_tokens))
        if key not in self._reference:
            server, pin = (self.stock, None) if self.stock is not None else (self.ours, pinned(1, 0))
            self._reference[key] = ask(server, ids, new_tokens, pin)
        return self._reference[key]

    def run(self) -> None:
        for name in STAGES:
            began, before = time.monotonic(), self._counts()
            entry: dict[str, Any] = {}
            try:
                entry |= getattr(self, name)()
            except FAILURES as error:
                entry |= {"ok": False, "error": f"{type(error).__name__}: {error}"[:1500]}
            after = self._counts()
            entry |= {
                "seconds": round(time.monotonic() - began, 2),
                "steps": {kind: after[kind] - before[kind] for kind in after if before},
            }
            if name in GRAPH_STAGES and self.ours.uses_peer_memory and not entry["steps"].get("sharded_graph"):
                entry |= {"ok": False, "error": "no step with sharded rows ran as a graph"}
            self.result["stages"][name] = entry
            print(self.ours.name, name, json.dumps(entry)[:900], flush=True)
            self.save()
            if not self.ours.alive:
                break

    def _counts(self) -> dict[str, float]:
        time.sleep(0.3)  # counters are published ten times a second
        try:
            return step_counts(self.ours)
        except FAILURES:
            return {}

    def _compare(self, degree: int) -> list[dict[str, Any]]:
        pins = [pinned(degree, index % self.ours.instances) for index in range(len(self.prompts))]
        with ThreadPoolExecutor(3) as pool:
            answers = list(pool.map(lambda pair: ask(self.ours, pair[0], NEW_TOKENS, pair[1]), zip(self.prompts, pins, strict=True)))
        return [differences(self.reference(ids, NEW_TOKENS), answer) for ids, answer in zip(self.prompts, answers, strict=True)]

    def unsharded(self) -> dict[str, Any]:
        """Degree 1 at home: SGLang's own path, graphs included. What it differs from stock by is the measure for the rest."""
        self.base = summary(self._compare(1))
        return {"ok": self.base["parted_without_tie"] == 0, **self.base}

    def sharded(self) -> dict[str, Any]:
        found = summary(self._compare(2))
        return {"ok": within_bounds(found, self.base) and set(found["degrees"]) == {2}, **found}

    def sharded_again(self) -> dict[str, Any]:
        """Pages are others now."""
        return self.sharded()

    def growth(self) -> dict[str, Any]:
        ids, new_tokens = prompt(self.sizes.growing, 101), self.sizes.growing_new
        answer = ask(self.ours, ids, new_tokens, pinned(1, 0))
        if self.stock is None:
            return {"ok": len(answer.output_tokens) == new_tokens, "dyncp": answer.meta.get("dyncp")}
        found = summary([differences(self.reference(ids, new_tokens), answer)])
        return {"ok": within_bounds(found, self.base) and found["degrees"] == [2], "dyncp": answer.meta.get("dyncp"), **found}

    def longer_than_a_pool(self) -> dict[str, Any]:
        ids = prompt(self.sizes.long, 102)
        answer = ask(self.ours, ids, NEW_TOKENS, None)
        found = {"dyncp": answer.meta.get("dyncp"), "output_tokens": len(answer.output_tokens)}
        if self.stock is None:
            return {"ok": len(answer.output_tokens) == NEW_TOKENS, **found}
        compared = summary([differences(self.reference(ids, NEW_TOKENS), answer)])
        return {"ok": within_bounds(compared, self.base), **found, **compared}

    def soak(self) -> dict[str, Any]:
        """Requests of random length, degree and home, eight at a time: steps mix prefills, decodes and idleness."""
        rng = random.Random(5)
        jobs = [
            (prompt(rng.randrange(20, self.sizes.pool // 4), 200 + i), rng.randrange(1, 40), pinned(rng.choice((1, 1, 2)), i % 2))
            for i in range(self.sizes.soak_requests)
        ]
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda job: ask(self.ours, *job), jobs))
        wrong = sum(len(answer.output_tokens) != job[1] for answer, job in zip(answers, jobs, strict=True))
        return {"ok": wrong == 0 and self.ours.alive, "requests": len(jobs), "of_wrong_length": wrong}

    def graphs_after(self) -> dict[str, Any]:
        """Unsharded again: the pool is whole and steps are graphs again."""
        found = summary(self._compare(1))
        return {"ok": found["parted_without_tie"] == 0 and self.ours.alive, **found}


def build_servers(args: argparse.Namespace, models: dict[str, Path]) -> dict[str, tuple[GpuServer, GpuServer | None]]:
    """Name of the check -> (ours, stock)."""
    pairs: dict[str, tuple[GpuServer, GpuServer | None]] = {}
    stock: dict[str, GpuServer] = {}
    for name in args.only.split(","):
        model = name.partition("_")[0]
        mla = ("--flashinfer-mla-disable-ragged",) if model == "mla" and args.device == "cuda" else ()
        kind = name.partition("_")[2]
        transport = KIND_FLAGS.get(kind) or (("--dyncp-transport", kind) if kind else ())
        transport += ("--disable-overlap-schedule",) if kind == "gloo" else ()
        ours = GpuServer(name, models[model], 2, SIZES[args.device].pool, True, mla + transport, one_gpu=args.one_gpu, device=args.device)
        if model not in stock and not args.without_stock:
            stock[model] = GpuServer(
                f"{model}_stock", models[model], 1, 4 * SIZES[args.device].pool, False, mla, one_gpu=args.one_gpu, device=args.device
            )
        pairs[name] = ours, stock.get(model)
    return pairs


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--limit", type=float, default=600.0, help="seconds for everything")
    parser.add_argument("--only", default="gqa,mla,gqa_gloo", help="checks: gqa or mla (peer memory), with _nccl or _gloo; mla_flashmla")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--without-stock", action="store_true", help="compare with the same server unsharded")
    parser.add_argument("--two-gpus", dest="one_gpu", action="store_false", help="one GPU per instance instead of one for all")
    args = parser.parse_args()
    end = time.monotonic() + args.limit
    args.out.mkdir(parents=True, exist_ok=True)
    args.one_gpu = args.one_gpu and args.device == "cuda"
    if args.device == "cpu":
        models = {"gqa": ROOT / "test" / "models" / "qwen3moe", "mla": ROOT / "test" / "models" / "deepseek_v2"}
    else:
        folder = Path(tempfile.mkdtemp(prefix="dyncp_models_"))
        models = {name: write_model(name, folder) for name in MODELS if name in args.only}
    pairs = build_servers(args, models)
    servers = list({id(s): s for pair in pairs.values() for s in pair if s is not None}.values())
    report: dict[str, Any] = {"bounds": BOUNDS, "sizes": asdict(SIZES[args.device]), "checks": {}, "servers": {}}

    def save() -> None:
        report["servers"] = {s.name: {"ready_s": s.ready_s, "alive": s.alive} for s in servers}
        (args.out / "runtime_check.json").write_text(json.dumps(report, indent=1))

    try:
        start_all(servers, args.out)

        def run(name: str) -> None:
            ours, stock = pairs[name]
            wait_ready([server for server in (ours, stock) if server is not None], end - 30)
            print(name, "ready", {s.name: s.ready_s for s in servers}, flush=True)
            if ours.ready_s is None or (stock is not None and stock.ready_s is None):
                report["checks"][name] = {"stages": {}, "error": "a server did not become ready"}
                return
            check = Check(ours, stock, save)
            report["checks"][name] = check.result
            check.run()

        threads = [threading.Thread(target=run, args=(name,), daemon=True) for name in pairs]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads) and time.monotonic() < end - 8:
            time.sleep(0.25)
        if any(thread.is_alive() for thread in threads):
            report["timed_out"] = True
            for server in servers:
                server.dump_stacks()
    except BaseException:
        report["error"] = traceback.format_exc()[-3000:]
        raise
    finally:
        for server in servers:
            if server.dyncp and server.ready_s is None and server.alive:
                server.dump_stacks()
        stop_all(servers)
        save()
    stages = [stage for check in report["checks"].values() for stage in check["stages"].values()]
    complete = len(report["checks"]) == len(pairs) and all(len(c["stages"]) == len(STAGES) for c in report["checks"].values())
    print("result", complete and all(stage["ok"] for stage in stages), os.fspath(args.out))
    return 0 if complete and all(stage["ok"] for stage in stages) else 1


if __name__ == "__main__":
    sys.exit(main())
