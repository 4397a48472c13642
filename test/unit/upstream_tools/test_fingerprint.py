"""What counts as a change of a definition, and how names are found without importing."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from scripts.upstream_tools.compare import Kind, Seen, compare, exit_code, look_at
from scripts.upstream_tools.fingerprint import Fingerprint, fingerprint
from scripts.upstream_tools.locate import locate
from scripts.upstream_tools.source_tree import FolderTree
from scripts.upstream_tools.targets import Target

FUNCTION = "def f(a, b=1, *rest, c, d=2, **more):\n    return a + b\n"


def print_of(source: str) -> Fingerprint:
    return fingerprint(ast.parse(source).body[0])


def test_parameters_keep_kind_and_default() -> None:
    assert print_of(FUNCTION).parameters == ("a", "b=", "*rest", "c", "d=", "**more")
    assert print_of("def f(a, /, *, b): pass").parameters == ("a", "*", "b")


@pytest.mark.parametrize(
    "same",
    [
        'def f(a, b=1, *rest, c, d=2, **more):\n    "A docstring."\n    return a + b\n',
        "def f(a, b=1, *rest, c, d=2, **more):\n\n    # why\n    return (a +\n            b)\n",
        "def f(a: int, b: int = 1, *rest, c: str, d=2, **more) -> int:\n    return a + b\n",
    ],
    ids=["docstring", "layout", "annotations"],
)
def test_what_does_not_count(same: str) -> None:
    assert print_of(same) == print_of(FUNCTION)


def test_what_counts() -> None:
    assert print_of(FUNCTION.replace("a + b", "a - b")).body != print_of(FUNCTION).body
    for other in (FUNCTION.replace("b=1", "b"), FUNCTION.replace("c,", "c, e,"), "async " + FUNCTION, "@staticmethod\n" + FUNCTION):
        assert print_of(other).signature != print_of(FUNCTION).signature


@pytest.fixture
def tree(tmp_path: Path) -> FolderTree:
    """A package with a re-export, a base class in another module, a definition under `if`, and an object of another package."""
    files = {
        "sglang/__init__.py": "",
        "sglang/srt/__init__.py": "from sglang.srt.inner import Base as Renamed\nfrom .inner import *\n",
        "sglang/srt/inner.py": "class Base:\n    def m(self, x):\n        return x\n\nif True:\n    def late(): pass\n",
        "sglang/srt/outer.py": "from sglang.srt.inner import Base\napp = App()\n\nclass Derived(Base):\n    y: int = 0\n\nDerived().m(1)\n",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return FolderTree(tmp_path)


@pytest.mark.parametrize(
    ("target", "path"),
    [
        ("sglang.srt.inner.Base.m", "sglang/srt/inner.py"),
        ("sglang.srt.outer.Derived.m", "sglang/srt/inner.py"),
        ("sglang.srt.Renamed.m", "sglang/srt/inner.py"),
        ("sglang.srt.late", "sglang/srt/inner.py"),
        ("sglang.srt.outer.app.route", "sglang/srt/outer.py"),
    ],
)
def test_names_are_found_as_python_would(target: str, path: str, tree: FolderTree) -> None:
    definition = locate(tree, target)
    assert definition is not None
    assert definition.path == path


@pytest.mark.parametrize("target", ["sglang.srt.inner.Base.gone", "sglang.srt.gone.f", "sglang.srt.inner.Gone.m", "elsewhere.f"])
def test_names_that_are_not_there(target: str, tree: FolderTree) -> None:
    assert locate(tree, target) is None


def test_verdicts_and_exit_codes(tree: FolderTree) -> None:
    called, uncalled = Target("sglang.srt.inner.Base.m", "hook: after", True), Target("sglang.srt.inner.late", "hook: after", True)
    added = Target("sglang.srt.inner.Base.m2", "hook: add", must_exist=False)
    seen = look_at(tree, [called, uncalled, added])
    pinned = dict(seen)
    assert [v.kind for v in compare([called, added], pinned, seen)] == [Kind.SAME, Kind.SAME]
    pinned[uncalled.path] = Seen(seen[uncalled.path].found, called=True)
    assert [v.kind for v in compare([uncalled], pinned, seen)] == [Kind.NOT_CALLED]
    now_there = {**seen, added.path: seen[called.path]}
    assert [v.kind for v in compare([added], pinned, now_there)] == [Kind.NOW_THERE]
    unrecorded = compare([Target("sglang.srt.other", "imported")], pinned, seen)
    assert [v.kind for v in unrecorded] == [Kind.UNRECORDED]
    assert (exit_code([]), exit_code(unrecorded)) == (0, 2)


def test_a_fingerprint_survives_json() -> None:
    value = print_of(FUNCTION)
    assert Fingerprint.from_json(value.to_json()) == value
