"""Which part may import what, and nothing at work on import: read from the syntax trees. test_house_limits.py: how large things are."""

from __future__ import annotations

import ast
import sys
from collections.abc import Collection, Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = REPOSITORY / "python" / "sglang_dcp"

STAND_IN = PACKAGE / "cpu" / "standin"
FILES = sorted(path for path in PACKAGE.rglob("*.py") if STAND_IN not in path.parents)
MAY_IMPORT_SGLANG = ("upstream/", "cpu/", "plugin.py")
STANDARD_LIBRARY = sys.stdlib_module_names


def relative(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def imported_modules(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every import, wherever it stands; also importlib.import_module and pkgutil.resolve_name of a literal."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import; write it out"
            yield node.lineno, node.module or ""
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
            literal = node.args and isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str)
            if name in ("import_module", "resolve_name", "__import__") and literal:
                yield node.lineno, node.args[0].value


def violations(path: str, tree: ast.AST) -> list[str]:
    """Imports that the folder of `path` (relative to the package) may not have."""
    found = []
    for line, module in imported_modules(tree):
        top = module.split(".")[0]
        if top == "sglang" and not path.startswith(MAY_IMPORT_SGLANG):
            found.append(f"{path}:{line} imports {module}: only upstream/, cpu/ and plugin.py may import sglang")
        if path.startswith("policy/") and not is_policy_import(top, module):
            found.append(f"{path}:{line} imports {module}: policy/ is standard library only")
        if path.startswith("ledger/") and top != "numpy" and not is_ledger_import(top, module):
            found.append(f"{path}:{line} imports {module}: ledger/ is standard library and numpy only")
        if path.startswith("dataflow/") and module.startswith(("sglang_dcp.upstream", "sglang_dcp.cpu", "sglang_dcp.plugin")):
            found.append(f"{path}:{line} imports {module}: dataflow/ must not lean on what imports sglang")
    return found


def is_policy_import(top: str, module: str) -> bool:
    return top in STANDARD_LIBRARY or module.startswith("sglang_dcp.policy") or module == "sglang_dcp"


def is_ledger_import(top: str, module: str) -> bool:
    return is_policy_import(top, module) or module.startswith("sglang_dcp.ledger")


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_imports(path: Path) -> None:
    assert violations(relative(path), ast.parse(path.read_text())) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("policy/x.py", "import numpy"),
        ("policy/x.py", "def f():\n    import torch"),
        ("policy/x.py", "from sglang_dcp.ledger import messages"),
        ("ledger/x.py", "import torch.distributed as dist"),
        ("ledger/x.py", "from sglang_dcp.dataflow import merge"),
        ("dataflow/x.py", "from sglang.srt import utils"),
        ("dataflow/x.py", "import importlib\nimportlib.import_module('sglang.srt')"),
        ("dataflow/x.py", "from sglang_dcp.upstream import hooks"),
        ("cli.py", "import sglang"),
    ],
)
def test_the_rule_catches(path: str, source: str) -> None:
    assert violations(path, ast.parse(source))


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_names_and_docstring(path: Path) -> None:
    assert path.stem not in ("utils", "util", "common", "manager", "helpers", "misc"), "name the file after what it does"
    if path.name != "__init__.py":
        assert ast.get_docstring(ast.parse(path.read_text())), f"{relative(path)} has no module docstring"


# ---- circles


def module_names(root: Path, package: str) -> dict[str, Path]:
    """Dotted name -> file of every module below `root`."""
    found = {}
    for path in root.rglob("*.py"):
        if STAND_IN not in path.parents:
            parts = [package, *path.relative_to(root).with_suffix("").parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(tree: ast.AST, known: Collection[str]) -> set[str]:
    """Modules among `known` that are imported anywhere, for their types alone too."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name in known else node.module for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & set(known)


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Sets of modules that reach each other, of two or more."""

    def reach(start: str) -> set[str]:
        seen, todo = set(), [start]
        while todo:
            for name in graph[todo.pop()] - seen:
                seen.add(name)
                todo.append(name)
        return seen

    reached = {name: reach(name) for name in graph}
    groups = {tuple(sorted(other for other in reached[name] if name in reached[other])) for name in graph if name in reached[name]}
    return [list(group) for group in sorted(groups)]


def test_no_two_modules_import_each_other_in_a_circle() -> None:
    modules = module_names(PACKAGE, "sglang_dcp") | module_names(REPOSITORY / "benchmark", "benchmark")
    graph = {name: imports_of(ast.parse(path.read_text()), modules) - {name} for name, path in modules.items()}
    assert len(graph) > 150
    assert circles(graph) == []


def test_circles_are_found() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}, "e": set()}
    assert circles(graph) == [["a", "b", "c"]]
    tree = ast.parse("if TYPE_CHECKING:\n    from x.b import name\ndef f():\n    from x import c")
    assert imports_of(tree, {"x.b", "x.c", "x.d"}) == {"x.b", "x.c"}
