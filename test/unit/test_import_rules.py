"""Which part may import what, and nothing at work on import: read from the syntax trees. test_house_limits.py: how large things are."""

from __future__ import annotations

import ast
import re
import subprocess
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
        if path.startswith("traces/") and top != "pyarrow" and not is_traces_import(top, module):
            found.append(f"{path}:{line} imports {module}: traces/ is standard library only, and pyarrow where a file is Parquet")
        if path.startswith("ledger/") and top != "numpy" and not is_ledger_import(top, module):
            found.append(f"{path}:{line} imports {module}: ledger/ is standard library and numpy only")
        if path.startswith("conversations/") and top != "numpy" and not is_conversations_import(top, module):
            found.append(f"{path}:{line} imports {module}: conversations/ is numpy, policy/, ledger/ and traces/ only")
        if path.startswith("dataflow/") and module.startswith(("sglang_dcp.upstream", "sglang_dcp.cpu", "sglang_dcp.plugin")):
            found.append(f"{path}:{line} imports {module}: dataflow/ must not lean on what imports sglang")
    return found


def is_policy_import(top: str, module: str) -> bool:
    return top in STANDARD_LIBRARY or module.startswith("sglang_dcp.policy") or module == "sglang_dcp"


def is_traces_import(top: str, module: str) -> bool:
    return is_policy_import(top, module) or module.startswith("sglang_dcp.traces")


def is_ledger_import(top: str, module: str) -> bool:
    return is_policy_import(top, module) or module.startswith("sglang_dcp.ledger")


def is_conversations_import(top: str, module: str) -> bool:
    return is_ledger_import(top, module) or module.startswith(("sglang_dcp.conversations", "sglang_dcp.traces"))


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_imports(path: Path) -> None:
    assert violations(relative(path), ast.parse(path.read_text())) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("policy/x.py", "import numpy"),
        ("policy/x.py", "def f():\n    import torch"),
        ("policy/x.py", "from sglang_dcp.ledger import messages"),
        ("traces/x.py", "import numpy"),
        ("ledger/x.py", "import torch.distributed as dist"),
        ("ledger/x.py", "from sglang_dcp.dataflow import merge"),
        ("conversations/x.py", "import torch"),
        ("conversations/x.py", "from sglang_dcp.dataflow import merge"),
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
    modules = module_names(PACKAGE, "sglang_dcp")
    for folder in ("benchmark", "testing"):
        modules |= module_names(REPOSITORY / folder, folder)
    graph = {name: imports_of(ast.parse(path.read_text()), modules) - {name} for name, path in modules.items()}
    assert len(graph) > 150
    assert circles(graph) == []


def test_circles_are_found() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}, "e": set()}
    assert circles(graph) == [["a", "b", "c"]]
    tree = ast.parse("if TYPE_CHECKING:\n    from x.b import name\ndef f():\n    from x import c")
    assert imports_of(tree, {"x.b", "x.c", "x.d"}) == {"x.b", "x.c"}


# ---- what a checkout imports, and what is installed of it


def path_edits(tree: ast.AST) -> list[int]:
    """Lines that change sys.path: calls of its methods, `site.addsitedir`, assignments to it or to a part of it."""
    found = []
    for node in ast.walk(tree):
        targets = []
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            is_read = node.func.attr in ("index", "count", "copy")
            targets = [node.func] if node.func.attr == "addsitedir" else [] if is_read else [node.func.value]
        elif isinstance(node, ast.Assign | ast.Delete):
            targets = node.targets
        elif isinstance(node, ast.AugAssign | ast.AnnAssign):
            targets = [node.target]
        for target in targets:
            while isinstance(target, ast.Subscript | ast.Starred):
                target = target.value
            if ast.unparse(target) in ("sys.path", "site.addsitedir"):
                found.append(node.lineno)
    return found


def test_nothing_edits_the_path_of_modules() -> None:
    """The root is on it: by pytest's `pythonpath`, by `python -m` from the root, by scripts/as_module.py for what is started as a file.
    A forked server gets its PYTHONPATH when Python has read another one."""
    folders = ("python", "test", "testing", "benchmark", "scripts", "sgl-kernel-dcp")
    sources = [path for folder in folders for path in (REPOSITORY / folder).rglob("*.py")]
    assert len(sources) > 400
    edits = {path.relative_to(REPOSITORY).as_posix(): path_edits(ast.parse(path.read_text())) for path in sources}
    assert [path for path, lines in edits.items() if lines] == ["testing/startup/forking.py"]


def test_a_script_starts_as_a_file() -> None:
    """`python scripts/X.py` has no root of the repository on its path: what needs that is a module, and the script starts it."""
    scripts = sorted((REPOSITORY / "scripts").glob("*.py"))
    assert len(scripts) > 8
    roots = {path.name: {name.split(".")[0] for _, name in imported_modules(ast.parse(path.read_text()))} for path in scripts}
    assert {name: found for name, found in roots.items() if found & {"scripts", "benchmark", "testing"}} == {}


@pytest.mark.parametrize(
    "source",
    ["sys.path.insert(0, 'x')", "sys.path[:0] = ['x']", "sys.path += ['x']", "sys.path = []", "del sys.path[0]", "site.addsitedir('x')"],
)
def test_path_edits_are_found(source: str) -> None:
    assert path_edits(ast.parse(source)) == [1]
    assert path_edits(ast.parse("for folder in sys.path: print(folder)\nsys.path.index('x')")) == []


@pytest.mark.parametrize(("project", "package"), [(".", "sglang_dcp"), ("sgl-kernel-dcp", "sgl_kernel_dcp")])
def test_what_is_installed_is_the_package_alone(project: str, package: str, tmp_path: Path) -> None:
    """Built as a wheel is: no test, no prompt, no client, no test model."""
    command = [sys.executable, "-c", "import setuptools; setuptools.setup()", "-q", "egg_info", "--egg-base", str(tmp_path)]
    command += ["build", "--build-base", str(tmp_path / "base"), "--build-lib", str(tmp_path / "lib")]
    subprocess.run(command, cwd=REPOSITORY / project, check=True, capture_output=True, timeout=120)
    files = {path.relative_to(tmp_path / "lib").as_posix() for path in (tmp_path / "lib").rglob("*") if path.is_file()}
    assert f"{package}/__init__.py" in files
    assert [name for name in files if not name.startswith(f"{package}/")] == []
    assert [name for name in files if re.search(r"(^|/)(tests?|testing|conftest)[/.]|/test_", name)] == []
