"""Records what past releases looked like, as hashes and verdicts only: the fixture of test/unit/upstream_tools/test_releases.py.

usage: python -m scripts.upstream_tools.history --wheels DIR
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from .compare import Seen, compare, look_at, read_fingerprints
from .source_tree import WheelTree
from .targets import REPOSITORY, all_targets
from .wheels import download_wheel

RELEASES = ("0.5.18", "0.5.19", "0.5.20", "0.5.21", "0.5.22", "0.5.23")
RECORD = REPOSITORY / "test" / "unit" / "upstream_tools" / "releases.json"


def summary(seen: Seen) -> list[Any] | None:
    """[hash of the signature, hash of the body, called], or None where the target does not exist."""
    return [seen.found.signature, seen.found.body, seen.called] if seen.found else None


def record(releases: tuple[str, ...], wheels: Path) -> dict[str, Any]:
    """version -> target -> {"verdict", "seen"}. Verdicts are against the pin's recorded fingerprints."""
    targets = all_targets()
    _, pin = read_fingerprints()
    result: dict[str, Any] = {}
    for version in releases:
        seen = look_at(WheelTree(download_wheel(version, wheels)), targets)
        verdicts = compare(targets, pin, seen)
        result[version] = {v.target.path: {"verdict": v.kind.value, "seen": summary(seen[v.target.path])} for v in verdicts}
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--wheels", type=Path, required=True, metavar="DIR", help="keeps the wheels; those that are there are used")
    data = record(RELEASES, parser.parse_args().wheels)
    lines = []
    for version, targets in data.items():
        rows = ",\n".join(f"  {json.dumps(path)}: {json.dumps(entry)}" for path, entry in sorted(targets.items()))
        lines.append(f" {json.dumps(version)}: {{\n{rows}\n }}")
    RECORD.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"recorded {', '.join(data)} in {RECORD.relative_to(REPOSITORY)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
