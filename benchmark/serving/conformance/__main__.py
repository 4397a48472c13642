"""Asks a stock server and one of ours the same, and says what differs.

    python -m benchmark.serving.conformance [--only TEXT] [--out benchmark/results/conformance.json]

Two instances each, with the same flags but for --enable-dyncp. Exits with 1 where a difference is not documented.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmark.serving.conformance.acts import act_cases
from benchmark.serving.conformance.case import Case
from benchmark.serving.conformance.doors import door_cases, refused_cases
from benchmark.serving.conformance.native import native_cases
from benchmark.serving.conformance.openai import openai_cases
from benchmark.serving.conformance.outcome import Outcome, difference, read_outcome
from benchmark.serving.conformance.sampling import sampling_cases
from benchmark.serving.provenance import provenance
from testing.client import Client
from testing.server import Server, ServerConfig, server_pool

ROOT = Path(__file__).resolve().parents[3]
STOCK = ServerConfig(
    "qwen3moe",
    instances=2,
    pool_tokens=8192,
    chunk_tokens=256,
    flags=("--enable-metrics", "--enable-cache-report", "--tool-call-parser", "qwen25", "--constrained-json-disable-any-whitespace"),
)
ANSWER_LIMIT_S = 60.0
STREAM = "what cannot be served is HTTP 400, also for streams (operator's guide, per request)"
SHAPE = "stock answers HTTP 500: shapes of lists are looked at (request_ranges.check_body)"
NOT_SERVED = "refused by name, where stock ignores it (operator's guide, what is not served)"
DOCUMENTED = {
    "logprobs: flat stream": STREAM,
    "together: regex and schema, stream": STREAM,
    "generate: a parameter list": SHAPE,
    "batch: parameters of one": SHAPE,
    "batch: logprob start of one": SHAPE,
    "field: image": NOT_SERVED,
    "field: delimiters": NOT_SERVED,
}
"""Differences by case that are meant."""


def all_cases() -> list[Case]:
    cases = [*native_cases(), *sampling_cases(), *openai_cases(), *door_cases(), *act_cases(), *refused_cases()]
    return [replace(case, documented=DOCUMENTED.get(case.name, case.documented)) for case in cases]


def ask(client: Client, case: Case) -> Outcome:
    """status 0: no answer within ANSWER_LIMIT_S, or the connection was cut."""
    try:
        if case.act is not None:
            return Outcome(200, None, json.loads(json.dumps(case.act(client))))
        status, text = client.request(case.method, case.path, case.body, case.headers)
    except (OSError, ValueError, RuntimeError, StopIteration) as error:
        return Outcome(0, None, None, repr(error))
    return read_outcome(status, text, sampled=case.sampled)


def ask_all(server: Server, cases: Sequence[Case]) -> dict[str, Outcome]:
    """Raises RuntimeError when the server ends."""
    client = replace(server.client, timeout_s=ANSWER_LIMIT_S)
    outcomes: dict[str, Outcome] = {}
    for case in cases:
        outcomes[case.name] = ask(client, case)
        if not server.is_alive:
            raise RuntimeError(f"the server ended at {case.name}\n{server.last_words()}")
    return outcomes


def judge(cases: Sequence[Case], stock: dict[str, Outcome], ours: dict[str, Outcome]) -> dict[str, Any]:
    """Which cases are answered alike, which differ as documented, and which differ otherwise."""
    found = {case.name: difference(stock[case.name], ours[case.name]) for case in cases}
    documented = {case.name: case.documented for case in cases if case.documented and found[case.name]}
    faults = {name: text for name, text in found.items() if text and name not in documented}
    return {"asked": len(cases), "alike": sum(text is None for text in found.values()), "documented": documented, "faults": faults}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmark" / "results" / "conformance.json")
    arguments = parser.parse_args()
    cases = [case for case in all_cases() if arguments.only in case.name]
    with server_pool(ROOT / "logs") as servers:
        stock = ask_all(servers.get(STOCK), cases)
        ours = ask_all(servers.get(replace(STOCK, dyncp=True)), cases)
    report = judge(cases, stock, ours)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(provenance("python -m benchmark.serving.conformance") | report, indent=1) + "\n")
    for name, text in report["faults"].items():
        print(f"{name}: {text}")
    documented, faults = len(report["documented"]), len(report["faults"])
    print(f"{report['asked']} asked, {report['alike']} alike, {documented} differ as documented, {faults} otherwise")
    return 1 if report["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
