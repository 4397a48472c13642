"""Finds the definition behind a dotted path in a source tree: through re-exports and base classes, as Python would."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from .source_tree import SourceTree

MAX_REEXPORTS = 5


@dataclass(frozen=True)
class Definition:
    """Where a target is defined. owner: the class that holds it, for methods."""

    path: str
    node: ast.stmt
    owner: ast.ClassDef | None = None

    @property
    def lines(self) -> tuple[int, int]:
        """First and last line, decorators included; counted from 1."""
        decorators = getattr(self.node, "decorator_list", [])
        first = min([self.node.lineno, *(decorator.lineno for decorator in decorators)])
        return first, self.node.end_lineno or self.node.lineno

    def text(self, tree: SourceTree) -> list[str]:
        first, last = self.lines
        return (tree.read(self.path) or "").splitlines()[first - 1 : last]


def locate(tree: SourceTree, target: str) -> Definition | None:
    """None where a part of the path does not exist."""
    parts = target.split(".")
    for length in range(len(parts) - 1, 0, -1):
        path = tree.module_path(".".join(parts[:length]))
        if path is not None:
            return _in_module(tree, path, parts[length:], MAX_REEXPORTS)
    return None


def _in_module(tree: SourceTree, path: str, names: list[str], hops: int) -> Definition | None:
    for node in _statements(tree.parse(path).body):
        if _defines(node, names[0]):
            found = Definition(path, node)
            return found if len(names) == 1 else _in_class(tree, found, names[1:], hops)
    origin = _imported_from(tree, path, names[0])
    if origin is None or hops == 0:
        return None
    module, name = origin
    module_path = tree.module_path(module)
    return _in_module(tree, module_path, [name, *names[1:]], hops - 1) if module_path else None


def _in_class(tree: SourceTree, found: Definition, names: list[str], hops: int) -> Definition | None:
    if isinstance(found.node, ast.Assign | ast.AnnAssign):
        # An attribute of an object, whose class may be another package's: the object is what can be compared.
        return found
    if not isinstance(found.node, ast.ClassDef):
        return None
    for node in _statements(found.node.body):
        if _defines(node, names[0]):
            inner = Definition(found.path, node, found.node)
            return inner if len(names) == 1 else _in_class(tree, inner, names[1:], hops)
    if hops == 0:
        return None
    for base in found.node.bases:
        inherited = _in_module(tree, found.path, [*ast.unparse(base).split("."), *names], hops - 1)
        if inherited is not None:
            return inherited
    return None


def _statements(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements of a body, those under if, try and with included."""
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try | ast.With):
            for name in ("body", "orelse", "finalbody"):
                yield from _statements(getattr(node, name, []))
            for handler in getattr(node, "handlers", []):
                yield from _statements(handler.body)


def _defines(node: ast.stmt, name: str) -> bool:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return node.name == name
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return any(isinstance(target, ast.Name) and target.id == name for target in targets)


def _imported_from(tree: SourceTree, path: str, name: str) -> tuple[str, str] | None:
    """(module, name) that `name` is imported from in a file."""
    package = path.removesuffix(".py").removesuffix("/__init__").split("/")
    if not path.endswith("/__init__.py"):
        package = package[:-1]
    for node in _statements(tree.parse(path).body):
        if not isinstance(node, ast.ImportFrom):
            continue
        prefix = package[: len(package) - node.level + 1] if node.level else []
        module = ".".join([*prefix, *([node.module] if node.module else [])])
        for alias in node.names:
            if (alias.asname or alias.name) == name:
                return module, alias.name
            source = tree.module_path(module) if alias.name == "*" else None
            if source and any(_defines(inner, name) for inner in _statements(tree.parse(source).body)):
                return module, name
    return None


def find_moved(tree: SourceTree, target: str) -> list[str]:
    """Dotted paths of definitions with the target's own name elsewhere in the package: where it may have gone."""
    name = target.rpartition(".")[2]
    if name.startswith("__"):
        return []
    places = []
    for path in tree.paths():
        text = tree.read(path) or ""
        if f"def {name}(" not in text and f"class {name}" not in text:
            continue
        module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for owner, node in _definitions(tree.parse(path)):
            if node.name == name:
                places.append(f"{module}.{owner}{name}")
    return [place for place in places if place != target]


def _definitions(module: ast.Module) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]]:
    for node in _statements(module.body):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield "", node
        if isinstance(node, ast.ClassDef):
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef):
                    yield f"{node.name}.", inner
