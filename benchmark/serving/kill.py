"""Seconds from the death of an instance to the last client's answer, eight requests open; and what a server leaves behind.

    python -m benchmark.serving.kill [--runs 10] [--out benchmark/results/operate.json]

Every run is a start, a mix of requests, SIGKILL to one of two instances, eight answers and the end; then a start and an orderly stop.
"""

from __future__ import annotations

import argparse
import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmark.serving.leftovers import Possessions
from benchmark.serving.mixed import ROOT, Outcome, mixed_server, send_mixed
from benchmark.serving.provenance import provenance
from testing.server import Server, server_pool

EXIT_SECONDS = 120.0
SETTLE_SECONDS = 10.0


def lose(server: Server, how: Callable[[Possessions], None]) -> tuple[float, list[Outcome], Possessions]:
    """Does `how` to a server with eight requests of all kinds under way. Returns seconds to the last answer, the answers, what it had."""
    possessions = Possessions.of(server.process.pid, server.port)
    load = send_mixed(server.client)
    load.wait_until_mixed()
    began = time.monotonic()
    how(possessions)
    outcomes = load.outcomes()
    return max(outcome.at for outcome in outcomes) - began, outcomes, possessions


def wait_until_gone(possessions: Possessions) -> list[str]:
    """What is left: nothing, or what is still there after some seconds; Python's resource tracker ends after its server."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while (left := possessions.left()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


def kill_instance(possessions: Possessions) -> None:
    possessions.instance(1).send_signal(signal.SIGKILL)


def measure(runs: int) -> dict[str, Any]:
    seconds: list[float] = []
    left: list[str] = []
    codes: set[int] = set()
    statuses: set[int | None] = set()
    with server_pool(ROOT / "logs") as servers:
        for run in range(runs):
            server = servers.get(mixed_server())
            answered_s, outcomes, possessions = lose(server, kill_instance)
            codes.add(server.process.wait(EXIT_SECONDS))
            left += wait_until_gone(possessions)
            seconds.append(round(answered_s, 2))
            statuses |= {outcome.status for outcome in outcomes}
            print(f"run {run + 1} of {runs}: last answer after {answered_s:.2f} s, left {left}", flush=True)
            server = servers.get(mixed_server())
            possessions = Possessions.of(server.process.pid, server.port)
            server.process.send_signal(signal.SIGTERM)
            server.process.wait(EXIT_SECONDS)
            left += wait_until_gone(possessions)
    return {
        "kill_to_last_answer_s": max(seconds),
        "runs_s": seconds,
        "statuses": sorted(statuses, key=str),
        "exit_codes": sorted(codes),
        "starts_and_stops": 2 * runs,
        "left_behind": left,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmark" / "results" / "operate.json")
    arguments = parser.parse_args()
    result = measure(arguments.runs)
    arguments.out.write_text(json.dumps(provenance(f"python -m benchmark.serving.kill --runs {arguments.runs}") | result, indent=1) + "\n")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
