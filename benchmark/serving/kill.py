"""Seconds from the death of an instance to the last client's answer, eight requests open; and what a server leaves behind.

    python -m benchmark.serving.kill [--runs 10] [--out benchmark/results/operate.json]

Every run is a start, a mix of requests, SIGKILL to one of two instances, eight answers and the end. Then as many starts and orderly stops,
each with a request under way that ends by itself.
Others on this machine get their servers in between: after each start, or after --hold seconds of starts where many wait.
"""

from __future__ import annotations

import argparse
import getpass
import json
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmark.serving.leftovers import Possessions, temporary_files
from benchmark.serving.mixed import ROOT, Outcome, mixed_server, send_mixed, send_one
from benchmark.serving.provenance import provenance
from testing.server import Server, ServerPool, server_pool

EXIT_SECONDS = 120.0
SETTLE_SECONDS = 10.0
YIELD_SECONDS = 1.0
"""Between two runs, for who waits for the machine's one server to wake up."""
COMPILED = Path(tempfile.gettempdir()) / f"torchinductor_{getpass.getuser()}"
"""What torch has compiled for servers before, so that none of them does it anew."""


def lose(server: Server, how: Callable[[Possessions], None]) -> tuple[float, list[Outcome], Possessions]:
    """Does `how` to a server with eight requests of all kinds under way. Returns seconds to the last answer, the answers, what it had."""
    possessions = Possessions.of(server.process.pid, server.port)
    load = send_mixed(server.client)
    load.wait_until_mixed()
    began = time.monotonic()
    how(possessions)
    outcomes = load.outcomes()
    return max(outcome.at for outcome in outcomes) - began, outcomes, possessions


def wait_until_gone(possessions: Possessions, temporary: Path | None = None) -> list[str]:
    """What is left: nothing, or what is still there after some seconds; Python's resource tracker ends after its server.

    temporary: the folder that the server had for its temporary files, if it had one of its own.
    """
    deadline = time.monotonic() + SETTLE_SECONDS
    while (left := possessions.left() + temporary_files(temporary)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


def kill_instance(possessions: Possessions) -> None:
    possessions.instance(1).send_signal(signal.SIGKILL)


@dataclass
class Record:
    """What the runs so far have shown."""

    seconds: list[float] = field(default_factory=list)
    stops: int = 0
    left: list[str] = field(default_factory=list)
    codes: set[int] = field(default_factory=set)
    statuses: set[int | None] = field(default_factory=set)
    codes_of_stops: set[int] = field(default_factory=set)
    statuses_of_stops: set[int | None] = field(default_factory=set)
    commits: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, result: dict[str, Any]) -> Record:
        """The record of which `as_result`, and where it came from, was written."""
        return cls(
            seconds=list(result["runs_s"]),
            stops=result["orderly_stops"],
            left=list(result["left_behind"]),
            codes=set(result["exit_codes_after_a_kill"]),
            statuses=set(result["statuses"]),
            codes_of_stops=set(result["exit_codes_of_orderly_stops"]),
            statuses_of_stops=set(result["statuses_at_orderly_stops"]),
            commits=result["commit"].split(", "),
            notes=list(result["notes"]),
        )

    def as_result(self) -> dict[str, Any]:
        return {
            "commit": ", ".join(self.commits),
            "kill_to_last_answer_s": max(self.seconds),
            "runs_s": self.seconds,
            "statuses": sorted(self.statuses, key=str),
            "exit_codes_after_a_kill": sorted(self.codes),
            "starts": len(self.seconds) + self.stops,
            "orderly_stops": self.stops,
            "statuses_at_orderly_stops": sorted(self.statuses_of_stops, key=str),
            "exit_codes_of_orderly_stops": sorted(self.codes_of_stops),
            "left_behind": self.left,
            "notes": self.notes,
        }


def kill_once(server: Server, temporary: Path, record: Record) -> None:
    answered_s, outcomes, possessions = lose(server, kill_instance)
    record.codes.add(server.process.wait(EXIT_SECONDS))
    record.left += wait_until_gone(possessions, temporary)
    record.seconds.append(round(answered_s, 2))
    record.statuses |= {outcome.status for outcome in outcomes}


def stop_once(server: Server, temporary: Path, record: Record) -> None:
    possessions = Possessions.of(server.process.pid, server.port)
    load = send_one(server.client)
    load.wait_until_mixed(("running",))
    server.process.send_signal(signal.SIGTERM)
    record.statuses_of_stops |= {outcome.status for outcome in load.outcomes()}
    record.codes_of_stops.add(server.process.wait(EXIT_SECONDS))
    record.left += wait_until_gone(possessions, temporary)
    record.stops += 1


def run_once(servers: ServerPool, end: Callable[[Server, Path, Record], None], record: Record) -> None:
    """One start and its end. The server's temporary files have a folder to themselves, so that none escapes the count."""
    with tempfile.TemporaryDirectory() as folder:
        environment = (("TMPDIR", folder), ("TORCHINDUCTOR_CACHE_DIR", str(COMPILED)))
        end(servers.get(mixed_server(environment=environment)), Path(folder), record)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10, help="starts that end with a kill, then as many that end with SIGTERM")
    parser.add_argument("--hold", type=float, default=0.0, help="seconds in which further starts follow before others get the machine")
    parser.add_argument("--go-on", action="store_true", help="count the runs that --out has, of other commits too, and do the rest")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmark" / "results" / "operate.json")
    arguments = parser.parse_args()
    record = Record.read(json.loads(arguments.out.read_text())) if arguments.go_on else Record()
    ends = [kill_once] * (arguments.runs - len(record.seconds)) + [stop_once] * (arguments.runs - record.stops)
    while ends:
        with server_pool(ROOT / "logs") as servers:
            head = provenance(f"python -m benchmark.serving.kill --runs {arguments.runs}")
            record.commits = list(dict.fromkeys([*record.commits, head["commit"]]))
            until = time.monotonic() + arguments.hold
            while ends:
                run_once(servers, ends.pop(0), record)
                print(json.dumps(record.as_result()), flush=True)
                arguments.out.write_text(json.dumps(head | record.as_result(), indent=1) + "\n")
                if time.monotonic() > until:
                    break
        time.sleep(YIELD_SECONDS)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
