"""Breaks the data path and the ledger on purpose, one fault at a time, and runs the tests that are meant to notice.

Prints which test noticed which fault. Exit code 0: every fault made a test fail, and the same tests pass without one; 1 otherwise.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path

from sglang_dcp.mutants import MUTANT_VARIABLE, MUTANTS, TESTING_VARIABLE

ROOT = Path(__file__).resolve().parents[1]

LAYER = "test/unit/dataflow/test_attention_step.py::test_random_steps[2-4-False]"
CHUNK = "test/unit/dataflow/test_attention_step.py::test_first_token_and_chunk_that_crosses_two_shards"
SESSION = "test/unit/test_decode_session.py::test_session_of_random_requests[2-8-4-False]"
WALK = "test/unit/test_protocol.py::test_random_walk_checked_after_every_step"
CONVERSATIONS = "test/unit/test_protocol_conversations.py::test_a_walk_of_conversations"
WINDOW = "test/unit/dataflow/test_window.py::test_random_steps[2-4-5]"
SINK = "test/unit/dataflow/test_window.py::test_a_sink_counts_once_however_many_shards_there_are"
READERS = "test/unit/test_protocol_sharing.py::test_a_walk_of_readers"

TESTS: dict[str, tuple[str, ...]] = {
    "shard-dropped": (LAYER, SESSION),
    "shard-read-twice": (LAYER, SESSION),
    "lse-base-2": (LAYER, SESSION),
    "lse-ignored": (LAYER, SESSION),
    "tail-row-written-twice": (SESSION,),
    "tail-row-not-written": (CHUNK, SESSION),
    "page-table-stale": (SESSION,),
    "guest-page-freed-early": (WALK, SESSION),
    "chunk-not-causal": (CHUNK, LAYER),
    "neutral-zero": (LAYER, SESSION),
    "wrong-owner": (LAYER, SESSION),
    "evicted-taken-over": (CONVERSATIONS,),
    "live-handle-evicted": (CONVERSATIONS,),
    "partial-page-kept": (CONVERSATIONS,),
    "retained-counted-as-free": (CONVERSATIONS,),
    "read-pages-evicted": (READERS,),
    "reader-frees-what-it-reads": (READERS,),
    "window-forgotten": (WINDOW,),
    "sink-counted-twice": (SINK,),
}
"""Fault -> tests meant to notice, cheapest first; the run stops at the first that does."""

NOTICED = re.compile(r"AssertionError|assert |sglang_dcp\.ledger\.integrity\.IntegrityError|sglang_dcp\.ledger\.participant\.ProtocolError")
"""What a noticed fault ends with. Any other error may as well be a mutant that no longer installs."""

FAILED = re.compile(r"^FAILED (\S+)(?: - (.*))?$", re.MULTILINE)


def run_tests(tests: tuple[str, ...], mutant: str | None) -> tuple[int, str]:
    """pytest's exit code and its output."""
    environment = {name: value for name, value in os.environ.items() if name not in (MUTANT_VARIABLE, TESTING_VARIABLE)}
    environment["COLUMNS"] = "240"
    if mutant is not None:
        environment |= {MUTANT_VARIABLE: mutant, TESTING_VARIABLE: "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--tb=line", *tests]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("mutants", nargs="*", metavar="MUTANT", help=f"default: all of {', '.join(MUTANTS)}")
    chosen = parser.parse_args().mutants or list(MUTANTS)
    unknown = sorted(set(chosen) - set(TESTS)) + sorted(set(MUTANTS) ^ set(TESTS))
    if unknown:
        parser.error(f"no such mutant, or one without tests: {', '.join(unknown)}")
    everything = tuple(dict.fromkeys(test for mutant in chosen for test in TESTS[mutant]))
    code, output = run_tests(everything, None)
    if code:
        print(f"the tests fail without any fault:\n{output}")
        return 1
    print(f"without a fault: {len(everything)} tests pass", flush=True)
    survived = []
    for mutant in chosen:
        start = time.monotonic()
        code, output = run_tests(TESTS[mutant], mutant)
        found = FAILED.search(output)
        if code != 1 or found is None or not NOTICED.match(found[2] or ""):
            survived.append(mutant)
            print(f"{mutant:24} NOT NOTICED (pytest exit code {code})\n{output}", flush=True)
        else:
            print(f"{mutant:24} {found[1]}  ({time.monotonic() - start:.0f} s)\n{'':24}   {(found[2] or '')[:150]}", flush=True)
    print(f"{len(chosen) - len(survived)} of {len(chosen)} faults noticed" + (f"; not: {', '.join(survived)}" if survived else ""))
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
