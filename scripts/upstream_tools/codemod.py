"""Edits of a source tree that find their place by syntax, not by line number, and come out as a patch."""

from __future__ import annotations

import ast
import difflib
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .locate import Definition, locate
from .source_tree import SourceTree


class CodemodError(RuntimeError):
    """The place of an edit is not there, or not once; the message names target and text."""


class EditedTree(SourceTree):
    """A tree with edits on top. The tree below is never written."""

    def __init__(self, base: SourceTree) -> None:
        super().__init__(base.name)
        self._base = base
        self._edited: dict[str, str] = {}

    def read(self, path: str) -> str | None:
        return self._edited.get(path) or self._base.read(path)

    def replace(self, target: str, old: str, new: str) -> None:
        """Replaces the only occurrence of `old` within the definition of `target`."""
        definition = self._find(target)
        first, last = definition.lines
        lines = self._lines(definition.path)
        body = "".join(lines[first - 1 : last])
        if body.count(old) != 1:
            raise CodemodError(f"{target}: {old!r} occurs {body.count(old)} times, expected once")
        self._write(definition.path, [*lines[: first - 1], body.replace(old, new), *lines[last:]])

    def replace_in_module(self, module: str, old: str, new: str) -> None:
        """Replaces the only occurrence of `old` in a module, for statements outside any definition."""
        path = self.module_path(module)
        text = (self.read(path) or "") if path is not None else ""
        if path is None or text.count(old) != 1:
            raise CodemodError(f"{module}: {old!r} occurs {text.count(old)} times, expected once")
        self._write(path, text.replace(old, new).splitlines(keepends=True))

    def replace_body(self, target: str, code: str) -> None:
        """The function gets another body; signature and docstring stay."""
        definition = self._find(target)
        statements = self._statements(definition, target)
        self._splice(definition, statements[0].lineno, statements[-1].end_lineno or 0, _clean(code))

    def insert_first(self, target: str, code: str) -> None:
        """Inserts statements before the first one of a function (after its docstring)."""
        definition = self._find(target)
        first = self._statements(definition, target)[0]
        self._splice(definition, first.lineno, first.lineno - 1, _clean(code))

    def insert_last(self, target: str, code: str) -> None:
        """Inserts statements after the last one of a function."""
        definition = self._find(target)
        last = self._statements(definition, target)[-1].end_lineno or 0
        self._splice(definition, last + 1, last, _clean(code))

    def insert_after(self, target: str, statement: str, code: str) -> None:
        """Inserts statements after the only one inside a function whose source starts with `statement`."""
        definition = self._find(target)
        found = [node for node in ast.walk(definition.node) if isinstance(node, ast.stmt) and ast.unparse(node).startswith(statement)]
        if len(found) != 1:
            raise CodemodError(f"{target}: {len(found)} statements start with {statement!r}, expected one")
        last = found[0].end_lineno or 0
        self._splice(definition, last + 1, last, _clean(code), indent=found[0].col_offset)

    def add_method(self, target: str, code: str) -> None:
        """Adds a method at the end of a class."""
        definition = self._find(target)
        last = definition.lines[1]
        self._splice(definition, last + 1, last, "\n" + _clean(code), indent=4)

    def add_before(self, target: str, code: str) -> None:
        """Adds module-level code before a top-level definition."""
        definition = self._find(target)
        first = definition.lines[0]
        self._splice(definition, first, first - 1, _clean(code) + "\n\n", indent=0)

    def add_to_module(self, module: str, code: str) -> None:
        path = self.module_path(module)
        if path is None:
            raise CodemodError(f"{module}: no such module in {self.name}")
        self._edited[path] = (self.read(path) or "").rstrip("\n") + "\n\n\n" + _clean(code)
        self._parsed.pop(path, None)

    def patch(self, prefix: str = "") -> str:
        """Unified diff of all edits, for `git apply`. prefix: where the package lies in the checkout ("python/")."""
        parts = []
        for path in sorted(self._edited):
            old, new = (self._base.read(path) or "").splitlines(keepends=True), self._edited[path].splitlines(keepends=True)
            parts += difflib.unified_diff(old, new, f"a/{prefix}{path}", f"b/{prefix}{path}")
        return "".join(parts)

    def _find(self, target: str) -> Definition:
        definition = locate(self, target)
        if definition is None:
            raise CodemodError(f"{target} is not in {self.name}")
        return definition

    def _statements(self, definition: Definition, target: str) -> list[ast.stmt]:
        if not isinstance(definition.node, ast.FunctionDef | ast.AsyncFunctionDef):
            raise CodemodError(f"{target} is not a function")
        body = definition.node.body
        is_docstring = isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant) and isinstance(body[0].value.value, str)
        return body[1:] if is_docstring and len(body) > 1 else body

    def _splice(self, definition: Definition, first: int, last: int, code: str, indent: int | None = None) -> None:
        """Puts `code` in place of lines first .. last (nothing is replaced where last = first - 1). indent: default that of the body."""
        if indent is None:
            indent = self._statements(definition, "")[0].col_offset
        lines = self._lines(definition.path)
        self._write(definition.path, [*lines[: first - 1], textwrap.indent(code, " " * indent), *lines[last:]])

    def _lines(self, path: str) -> list[str]:
        return (self.read(path) or "").splitlines(keepends=True)

    def _write(self, path: str, lines: Sequence[str]) -> None:
        text = "".join(lines)
        ast.parse(text, filename=path)
        self._edited[path] = text
        self._parsed.pop(path, None)


def _clean(code: str) -> str:
    """Without common indent and blank lines around, with one newline at the end."""
    return textwrap.dedent(code).strip("\n") + "\n"


@dataclass(frozen=True)
class Contribution:
    """A change that belongs upstream. gap, change, proof: the paragraphs of its pull request. closes: what of ours it makes unneeded."""

    name: str
    title: str
    gap: str
    change: str
    proof: str
    closes: str
    apply: Callable[[EditedTree], None]
