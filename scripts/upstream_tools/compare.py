"""Verdict for every target: the pin's fingerprint against another release's."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from .facts import find_facts
from .fingerprint import Fingerprint, fingerprint
from .locate import find_moved, locate
from .source_tree import SourceTree, called_names
from .targets import OVERLAY, Target

FINGERPRINTS = OVERLAY / "upstream" / "attach" / "fingerprints.json"

_NO_EFFECT = ("nothing calls it: the hook has no effect",)


class Kind(Enum):
    """Outcomes in the order of gravity; the value is what tables print."""

    SAME = "same"
    BODY = "body changed"
    SIGNATURE = "signature changed"
    NOT_CALLED = "no longer called"
    NOW_THERE = "now upstream"
    GONE = "gone"
    UNRECORDED = "not recorded"

    @property
    def exit_code(self) -> int:
        return {Kind.SAME: 0, Kind.BODY: 1}.get(self, 2)


@dataclass(frozen=True)
class Seen:
    """A target in one release. found is None where it does not exist."""

    found: Fingerprint | None
    called: bool

    def to_json(self) -> dict[str, Any]:
        return {"found": self.found.to_json() if self.found else None, "called": self.called}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Seen:
        return cls(Fingerprint.from_json(data["found"]) if data["found"] else None, data["called"])


@dataclass(frozen=True)
class Verdict:
    target: Target
    kind: Kind
    details: tuple[str, ...] = ()


def look_at(tree: SourceTree, targets: Sequence[Target]) -> dict[str, Seen]:
    """Every target as `tree` has it, by path."""
    called = called_names(tree, {target.called_name for target in targets if target.must_be_called})
    seen = {}
    for target in targets:
        definition = locate(tree, target.path)
        found = None
        if definition is not None:
            print_of_it = fingerprint(definition.node, definition.owner)
            found = Fingerprint(**{**print_of_it.__dict__, "facts": find_facts(target.path, definition.node)})
        seen[target.path] = Seen(found, target.called_name in called or not target.must_be_called)
    return seen


def compare(targets: Iterable[Target], pin: Mapping[str, Seen], other: Mapping[str, Seen], tree: SourceTree | None = None) -> list[Verdict]:
    """One verdict per target. tree: the other release's, to say where a missing name may have gone."""
    verdicts = []
    for target in targets:
        if target.path not in pin:
            verdicts.append(Verdict(target, Kind.UNRECORDED, ("new in the overlay: run scripts/check_upstream.py --record",)))
            continue
        verdict = _judge(target, pin[target.path], other[target.path])
        if verdict.kind is Kind.GONE and tree is not None:
            places = find_moved(tree, target.path)
            verdict = Verdict(target, Kind.GONE, tuple(f"a definition of that name is at {place}" for place in places[:3]))
        verdicts.append(verdict)
    return verdicts


def _judge(target: Target, pin: Seen, other: Seen) -> Verdict:
    if not target.must_exist:
        if other.found is not None:
            return Verdict(target, Kind.NOW_THERE, ("upstream has it: remove the hook",))
        return Verdict(target, Kind.SAME) if other.called else Verdict(target, Kind.NOT_CALLED, _NO_EFFECT)
    if pin.found is None:
        raise KeyError(f"{target.path} is not in the recorded fingerprints; run scripts/check_upstream.py --record")
    if other.found is None:
        return Verdict(target, Kind.GONE)
    before, after = pin.found, other.found
    details = [*_parameter_changes(before.parameters, after.parameters), *_fact_changes(before.facts, after.facts)]
    if before.descriptor != after.descriptor or before.kind != after.kind:
        details.insert(0, f"was {before.descriptor or before.kind}, is {after.descriptor or after.kind}")
    if before.bases != after.bases:
        details.append(f"base classes were ({', '.join(before.bases)}), are ({', '.join(after.bases)})")
    if before.signature != after.signature or (before.kind == "class" and before.bases != after.bases):
        return Verdict(target, Kind.SIGNATURE, tuple(details))
    if pin.called and not other.called:
        return Verdict(target, Kind.NOT_CALLED, _NO_EFFECT)
    changed = before.body != after.body or before.bases != after.bases
    return Verdict(target, Kind.BODY if changed else Kind.SAME, tuple(details))


def _parameter_changes(before: Sequence[str], after: Sequence[str]) -> list[str]:
    if before == after:
        return []
    old, new = {name.rstrip("="): name for name in before}, {name.rstrip("="): name for name in after}
    gone, added = [name for name in old if name not in new], [name for name in new if name not in old]
    if len(gone) == len(added) == 1 and list(old).index(gone[0]) == list(new).index(added[0]):
        return [f"parameter {gone[0]} renamed to {added[0]} or replaced by it"]
    details = [f"parameter {name} is gone" for name in gone]
    details += [f"new {'optional' if new[name].endswith('=') or name.startswith('*') else 'required'} parameter {name}" for name in added]
    for name in old:
        if name in new and old[name] != new[name]:
            details.append(f"parameter {name} {'gained' if new[name].endswith('=') else 'lost'} its default")
    return details or ["parameters are in another order"]


def _fact_changes(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    return [f"{name}: {before[name]} -> {after.get(name, '?')}" for name in before if before[name] != after.get(name)]


def exit_code(verdicts: Iterable[Verdict]) -> int:
    """0: all same; 1: bodies changed; 2: a signature changed, or a target is gone, has no effect or was never recorded."""
    return max((verdict.kind.exit_code for verdict in verdicts), default=0)


def table(verdicts: Sequence[Verdict], *, show_same: bool = False) -> str:
    """One line per target that is not the same (or per target), grave ones first, then the counts."""
    order = list(Kind)
    shown = [verdict for verdict in verdicts if show_same or verdict.kind is not Kind.SAME]
    lines = []
    for verdict in sorted(shown, key=lambda v: (-order.index(v.kind), v.target.path)):
        lines.append(f"{verdict.kind.value:<18} {verdict.target.path}  [{verdict.target.origin}]")
        lines += [f"{'':<18}   {detail}" for detail in verdict.details]
    counts = [f"{sum(v.kind is kind for v in verdicts)} {kind.value}" for kind in order]
    return "\n".join([*lines, f"{len(verdicts)} targets: " + ", ".join(counts)])


def write_fingerprints(version: str, seen: Mapping[str, Seen], path: Path = FINGERPRINTS) -> None:
    data = {"upstream": version, "targets": {name: seen[name].to_json() for name in sorted(seen)}}
    path.write_text(json.dumps(data, indent=1) + "\n")


def read_fingerprints(path: Path = FINGERPRINTS) -> tuple[str, dict[str, Seen]]:
    """(SGLang version, targets)."""
    data = json.loads(path.read_text())
    return data["upstream"], {name: Seen.from_json(entry) for name, entry in data["targets"].items()}
