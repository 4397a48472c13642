"""Serves a mixed load on four CPU instances and reports losses, leaks and balance.

    python -m benchmark.serving.soak --part long     2,000 requests, prompts of up to 3,500 tokens on pools of 1,024
    python -m benchmark.serving.soak --part short    the same arrivals with `dual-balance` and with `local`, prompts that fit one pool

`--record FILE` keeps every placement of the router with the loads it saw; `python -m benchmark.simulate.replay FILE` compares them.

`local` is SGLang's own total_tokens balancing of the same server: every request at degree 1, at home. It cannot serve the long part.
Exit code 1 when a request was lost or a pool did not drain. Timings are those of this machine and judge nothing.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmark.serving.balance import Sampler
from benchmark.serving.load import LoadRequest, Outcome, run_load, scaled_load
from benchmark.serving.provenance import provenance
from sglang_dcp.observe.placement_log import LOG_VARIABLE, PlacementLog
from testing.dyncp_grid import CHECK, INSTANCES, POOL_TOKENS
from testing.server import Server, ServerConfig, server_pool

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Part:
    requests: int
    per_second: float
    longest: int
    policies: tuple[str, ...]


PARTS = {"long": Part(2000, 4.0, 3500, ("dual-balance",)), "short": Part(600, 16.0, 900, ("dual-balance", "local"))}


@dataclass(frozen=True)
class SoakResult:
    policy: str
    requests: int
    longest_prompt: int
    answered: int
    aborted: int
    disconnected: int
    unexpected: list[str]
    drained: bool
    seconds: float
    balance: dict[str, float]
    mean_degree: float
    p95_degree: int
    small_at_degree_one: float
    degrees: dict[str, int]


def server_config(policy: str, model: str, record: Path | None = None) -> ServerConfig:
    return ServerConfig(
        model=model,
        instances=INSTANCES,
        pool_tokens=POOL_TOKENS,
        page_size=16,
        chunk_tokens=256,
        dyncp=True,
        flags=("--enable-metrics", "--dyncp-policy", policy),
        environment=CHECK if record is None else (*CHECK, (LOG_VARIABLE, str(record))),
    )


def soak(server: Server, policy: str, load: list[LoadRequest], longest: int, record: Path | None = None) -> SoakResult:
    with Sampler(server.port, INSTANCES) as sampler:
        outcome = run_load(server.port, load)
    if record is not None:
        for rid, moment in outcome.finished.items():
            PlacementLog(record).add_finish(moment, rid)
    return summarise(policy, load, longest, outcome, drains(server), sampler.summary(POOL_TOKENS))


def drains(server: Server, limit_s: float = 120.0) -> bool:
    """Whether the server falls idle with every pool whole: flushing works then only, after the page audit."""
    deadline = time.monotonic() + limit_s
    while server.is_alive and time.monotonic() < deadline:
        if server.client.flush_cache():
            return True
        time.sleep(0.5)
    return False


def summarise(policy: str, load: list[LoadRequest], longest: int, outcome: Outcome, drained: bool, balance: dict[str, float]) -> SoakResult:
    ends = sorted(end for _, _, end in outcome.degrees) or [0]
    small = [start for prompt, start, _ in outcome.degrees if prompt <= POOL_TOKENS // 10]
    return SoakResult(
        policy=policy,
        requests=len(load),
        longest_prompt=longest,
        answered=outcome.answered,
        aborted=outcome.aborted,
        disconnected=outcome.disconnected,
        unexpected=outcome.unexpected[:20],
        drained=drained,
        seconds=round(outcome.seconds, 1),
        balance=balance,
        mean_degree=sum(ends) / len(ends),
        p95_degree=ends[int(0.95 * (len(ends) - 1))],
        small_at_degree_one=sum(start == 1 for start in small) / max(1, len(small)),
        degrees={str(degree): count for degree, count in sorted(Counter(ends).items())},
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=tuple(PARTS), required=True)
    parser.add_argument("--requests", type=int, help="default: 2000 of the long part, 600 of the short")
    parser.add_argument("--per-second", type=float, help="default: 4 and 16; more than the machine serves, so that requests wait")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--model", default="qwen3moe")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmark" / "results" / "soak.json")
    parser.add_argument("--record", type=Path, help="file for the placements of the dual-balance runs (overwritten)")
    arguments = parser.parse_args()
    record: Path | None = arguments.record.resolve() if arguments.record else None
    if record is not None:
        record.unlink(missing_ok=True)
    part = PARTS[arguments.part]
    count, per_second = arguments.requests or part.requests, arguments.per_second or part.per_second
    results = []
    with server_pool(ROOT / "logs") as servers:
        for policy in part.policies:
            load = scaled_load(count, longest=part.longest, per_second=per_second, leaving=0.1, seed=arguments.seed)
            log = record if policy == "dual-balance" else None
            results.append(soak(servers.get(server_config(policy, arguments.model, log)), policy, load, part.longest, log))
            print(json.dumps(asdict(results[-1]), indent=1), flush=True)
    command = f"python -m benchmark.serving.soak --part {arguments.part} --requests {count} --per-second {per_second}"
    report = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    report[arguments.part] = provenance(command) | {"seed": arguments.seed, "runs": [asdict(result) for result in results]}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    return int(any(result.unexpected or not result.drained for result in results))


if __name__ == "__main__":
    raise SystemExit(main())
