"""SGLang's own behaviour with the plugin off, on with short requests, and on with every request sharded.

DYNCP_BEHAVIOUR_REPORT=FILE writes the outcomes as a table of this SGLang release.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from upstream.behaviour_checks import CHECKS, PROMPT

from testing.client import RequestFailed
from testing.server import Server, ServerConfig

HERE = Path(__file__).parent
ENTRIES: list[dict[str, Any]] = yaml.safe_load((HERE / "behaviour.yaml").read_text())
FLAGS = ("--enable-metrics", "--chat-template", "chatml", "--constrained-json-disable-any-whitespace")
MODES = {
    "off": ServerConfig("qwen3moe", 2, pool_tokens=8192, flags=FLAGS),
    "short": ServerConfig("qwen3moe", 2, pool_tokens=8192, dyncp=True, flags=FLAGS),
    "sharded": ServerConfig("qwen3moe", 2, pool_tokens=8192, dyncp=True, flags=(*FLAGS, "--dyncp-policy", "fixed", "--dyncp-degree", "2")),
}


@dataclass
class Outcomes:
    """What was seen so far. verdicts: name -> mode -> "holds" or the first line of what went wrong."""

    verdicts: dict[str, dict[str, str]] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)


@pytest.fixture(scope="module")
def outcomes() -> Iterator[Outcomes]:
    seen = Outcomes()
    yield seen
    if os.environ.get("DYNCP_BEHAVIOUR_REPORT"):
        write_report(seen, Path(os.environ["DYNCP_BEHAVIOUR_REPORT"]))


@pytest.fixture(scope="module", params=list(MODES))
def served(request: pytest.FixtureRequest, serve: Callable[[ServerConfig], Server]) -> tuple[str, Server]:
    return request.param, serve(MODES[request.param])


@pytest.mark.server
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry["name"])
def test_behaviour_holds(entry: dict[str, Any], served: tuple[str, Server], outcomes: Outcomes) -> None:
    mode, server = served
    verdicts = outcomes.verdicts.setdefault(entry["name"], {})
    expected_to_differ = (entry.get("differs") or {}).get(mode)
    try:
        result = CHECKS[entry["name"]](server.client)
        if entry.get("equal") and mode == "off":
            outcomes.results[entry["name"]] = result
        elif entry.get("equal"):
            expected = outcomes.results[entry["name"]]
            assert matches(result, expected), f"{result} is not what the plugin off gives: {expected}"
    except (AssertionError, RequestFailed, OSError, ValueError, KeyError, subprocess.TimeoutExpired) as error:
        verdicts[mode] = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        if expected_to_differ:
            verdicts[mode] = f"differs: {expected_to_differ}"
            return
        if mode != "off" and verdicts.get("off", "holds") != "holds":
            pytest.skip(f"does not hold with the plugin off either: {verdicts['off']}")
        raise
    verdicts[mode] = "holds"
    assert not expected_to_differ, f"{entry['name']} holds now; take {mode} out of `differs` in behaviour.yaml"


@pytest.mark.server
@pytest.mark.timeout(1800)
def test_requests_are_sharded_where_they_should_be(served: tuple[str, Server]) -> None:
    mode, server = served
    where = server.client.generate(PROMPT, max_new_tokens=2).meta.get("dyncp")
    assert (where and where["degree_end"]) == {"off": None, "short": 1, "sharded": 2}[mode]


def test_every_entry_has_a_check_and_every_check_an_entry() -> None:
    assert sorted(entry["name"] for entry in ENTRIES) == sorted(CHECKS)


def matches(result: Any, expected: Any) -> bool:
    """Equal, or numbers within 1e-4 of each other."""
    if isinstance(result, list) and result and isinstance(result[0], float):
        return len(result) == len(expected) and all(abs(a - b) <= 2e-4 for a, b in zip(result, expected, strict=True))
    return bool(result == expected)


def write_report(seen: Outcomes, path: Path) -> None:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True, check=False).stdout.strip()
    table = []
    for entry in ENTRIES:
        verdicts = {mode: seen.verdicts.get(entry["name"], {}).get(mode, "not run") for mode in MODES}
        table.append({"area": entry["area"], "name": entry["name"], "what": entry["what"], **verdicts})
    report = {
        "upstream": importlib.metadata.version("sglang"),
        "command": "DYNCP_BEHAVIOUR_REPORT=benchmark/results/upstream_behaviour.json python -m pytest test/upstream/test_behaviour.py",
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, no GPU",
        "commit": commit,
        "modes": {mode: " ".join(("--enable-dyncp", *c.flags[len(FLAGS) :])) if c.dyncp else "plugin off" for mode, c in MODES.items()},
        "counts": {mode: sum(row[mode] == "holds" for row in table) for mode in MODES},
        "table": table,
    }
    path.write_text(json.dumps(report, indent=1) + "\n")
