"""What identifies a function or class across releases: its parameters, and a hash of its body that formatting does not change."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Fingerprint:
    """One target in one release.

    kind:       "function", "class" or "value". descriptor: "", "staticmethod", "classmethod" or "property", with "async " in front.
    parameters: in order; "*" marks keyword-only, "*a" and "**k" catch-alls, a trailing "=" a default. A class: its annotated fields.
    bases:      of the class, or of the class that holds the method.
    body:       hash of the normalised syntax tree: no comments, layout, docstrings, annotations, positions.
    facts:      named counts that our code depends on (facts.py).
    """

    kind: str
    descriptor: str
    parameters: tuple[str, ...]
    bases: tuple[str, ...]
    body: str
    facts: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Fingerprint:
        return cls(**{**data, "parameters": tuple(data["parameters"]), "bases": tuple(data["bases"])})

    @property
    def signature(self) -> str:
        """Hash of everything that a caller sees."""
        return _digest(repr((self.kind, self.descriptor, self.parameters)))


def fingerprint(node: ast.stmt, owner: ast.ClassDef | None = None) -> Fingerprint:
    """Of a definition. owner: the class whose body holds it."""
    bases = tuple(ast.unparse(base) for base in owner.bases) if owner else ()
    if isinstance(node, Function):
        return Fingerprint("function", _descriptor(node), parameters(node.args), bases, _digest(_normalised(_without_docstring(node.body))))
    if isinstance(node, ast.ClassDef):
        own_bases = tuple(ast.unparse(base) for base in node.bases)
        return Fingerprint("class", "", class_fields(node), own_bases, _digest(_normalised(_without_docstring(node.body))))
    return Fingerprint("value", "", (), bases, _digest(_normalised(node)))


def parameters(arguments: ast.arguments) -> tuple[str, ...]:
    positional = [*arguments.posonlyargs, *arguments.args]
    first_default = len(positional) - len(arguments.defaults)
    names = [parameter.arg + ("=" if index >= first_default else "") for index, parameter in enumerate(positional)]
    if arguments.vararg:
        names.append(f"*{arguments.vararg.arg}")
    elif arguments.kwonlyargs:
        names.append("*")
    defaults = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    names += [parameter.arg + ("=" if default is not None else "") for parameter, default in defaults]
    if arguments.kwarg:
        names.append(f"**{arguments.kwarg.arg}")
    return tuple(names)


def class_fields(node: ast.ClassDef) -> tuple[str, ...]:
    annotated = [statement for statement in node.body if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)]
    return tuple(statement.target.id + ("=" if statement.value is not None else "") for statement in annotated)  # type: ignore[union-attr]


def _descriptor(node: Function) -> str:
    prefix = "async " if isinstance(node, ast.AsyncFunctionDef) else ""
    names = {ast.unparse(decorator) for decorator in node.decorator_list}
    kind = next((name for name in ("staticmethod", "classmethod", "property") if name in names), "")
    return (prefix + kind).strip()


def _without_docstring(body: Sequence[ast.stmt]) -> list[ast.stmt]:
    first = body[0] if body else None
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        return list(body[1:])
    return list(body)


# Fields that differ between Python versions or between equal programs.
_IGNORED = {"ctx", "kind", "type_comment", "type_params", "annotation", "returns", "lineno", "col_offset"}


def _normalised(node: Any) -> str:
    """A text of the tree that is the same on every Python version. Empty fields are left out: newer versions add some."""
    if isinstance(node, list):
        return "[" + ",".join(_normalised(item) for item in node) + "]"
    if not isinstance(node, ast.AST):
        return repr(node)
    parts = []
    for name, value in ast.iter_fields(node):
        if name in _IGNORED or value is None or value == []:
            continue
        if name == "body" and isinstance(node, Function | ast.ClassDef):
            value = _without_docstring(value)
        parts.append(f"{name}={_normalised(value)}")
    return f"{type(node).__name__}({','.join(parts)})"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
