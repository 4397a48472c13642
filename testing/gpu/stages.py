"""The stages of one case: unsharded, every degree, growth, prompts longer than a pool, a soak. See runtime_check.py."""

from __future__ import annotations

import http.client
import json
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from typing import Any

from testing.client import Answer
from testing.gpu.answers import ask, differences, pinned, prompt, step_counts, summary
from testing.gpu.runtime_cases import Case, within_bounds
from testing.gpu.servers import GpuServer

PEERS = re.compile(r"peer memory with instances (\d+)-(\d+)")
FAILURES = (RuntimeError, OSError, AssertionError, ValueError, LookupError, http.client.HTTPException)


class Check:
    """One server with dynamic context parallelism against one of stock. Stages run in order; a failed one does not stop the next."""

    def __init__(self, case: Case, ours: GpuServer, stock: GpuServer | None, save: Callable[[], None], only: Sequence[str] = ()) -> None:
        self.ours, self.stock, self.save, self.only, self.page_size = ours, stock, save, only, case.page_size
        self.node_size, self.chunk_tokens = case.node_size, ours.chunk_tokens
        self.sizes, self.bounds = case.sizes(ours.device), case.bounds(ours.device)
        self.result: dict[str, Any] = {"sizes": asdict(self.sizes), "bounds": dict(self.bounds), "stages": {}}
        self.prompts = [prompt(length, seed) for seed, length in enumerate(self.sizes.lengths)]
        self.base: dict[str, Any] = {}
        self._reference: dict[int, Answer] = {}

    def stages(self) -> Iterator[tuple[str, Callable[[], dict[str, Any]], bool]]:
        """(name, what runs, whether some of its decode steps with sharded rows must have run as graphs under peer memory)."""
        most = self.node_size
        yield "unsharded", self.unsharded, False
        for degree in range(2, most + 1):
            yield f"degree_{degree}", partial(self.sharded, degree), True
        yield f"degree_{most}_again", partial(self.sharded, most), True  # pages are others now
        for degree, length, new_tokens in self.sizes.growing:
            yield f"growth_from_{degree}", partial(self.growth, degree, length, new_tokens), True
        for pools, length in enumerate(self.sizes.longs, start=1):
            yield f"longer_than_{pools}_pool" + "s" * (pools > 1), partial(self.longer, pools, length), False
        if most < self.ours.instances:
            yield "nodes", self.nodes, True
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
            degree = min(rng.randint(1, self.node_size), most_degree, -(-length // self.page_size))
            jobs.append((prompt(length, 200 + index), new_tokens, pinned(degree, index % self.ours.instances)))
        found = self._compare(jobs, 8)
        return {"ok": self._holds(found) and self.ours.alive, "requests": len(jobs), **found}

    def nodes(self) -> dict[str, Any]:
        """Sharded rows in one node alone, then in every node at once. All decode steps of the first are graphs on all instances, with
        sharded rows in that node alone; no instance opens the memory of another node."""
        instances, size, new_tokens = self.ours.instances, self.node_size, 40
        homes = range(0, instances, size)
        jobs = [(self.prompts[-1], new_tokens, pinned(size, home)) for home in homes]
        before = self._counts()
        alone = self._compare(jobs[:1], 1)
        after = self._counts()
        together = self._compare(jobs, len(jobs))
        found: dict[str, Any] = {"ok": self._holds(alone) and self._holds(together), "alone": alone["all"], **together}
        if not self.ours.uses_peer_memory:
            return found
        chunks = -(-len(self.prompts[-1]) // (self.chunk_tokens or len(self.prompts[-1])))
        counts = {kind: after[kind] - before[kind] for kind in after}
        # A node's instances alone have sharded rows; a prefill step is eager on all. What else is eager was a decode step.
        decode_eager = max(0.0, counts["eager"] - instances * chunks) * size / instances
        share = counts["sharded_graph"] / max(1.0, counts["sharded_graph"] + decode_eager)
        opened = {(int(first), int(last)) for first, last in PEERS.findall(self.ours.log())}
        expected = {(home, home + size - 1) for home in homes}
        found |= {"sharded_graph_share": share, "counts": counts, "opened": sorted(opened)}
        graphs = size * (new_tokens - 1) <= counts["sharded_graph"] <= size * (new_tokens + 1) and counts["graph"] >= instances * (
            new_tokens - 1
        )
        found["ok"] = found["ok"] and share == 1.0 and graphs and opened == expected
        return found

    def soak_unsharded(self) -> dict[str, Any]:
        """The same requests on SGLang's own path: batches of it beside other processes on the GPU."""
        return self.soak(most_degree=1)

    def unsharded_again(self) -> dict[str, Any]:
        """The pool is whole and steps are graphs again."""
        found = self._compare_prompts(1)
        return {"ok": self._holds(found) and self.ours.alive, **found}
