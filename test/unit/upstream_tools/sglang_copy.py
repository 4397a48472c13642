"""A copy of the installed SGLang that tests may change: hard links where the file system allows, so that it takes a moment."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from scripts.upstream_tools.locate import Definition, locate
from scripts.upstream_tools.source_tree import FolderTree, installed_tree


def copy_sglang(folder: Path, *, only_sources: bool = False) -> FolderTree:
    """Everything of the package, or its Python files alone, under folder/sglang."""
    source = installed_tree().root / "sglang"

    def ignored(directory: str, names: list[str]) -> list[str]:
        if not only_sources:
            return []
        return [name for name in names if not name.endswith(".py") and (name == "__pycache__" or not Path(directory, name).is_dir())]

    shutil.copytree(source, folder / "sglang", copy_function=_link, ignore=ignored, symlinks=True)
    return FolderTree(folder)


def _link(source: str, destination: str) -> str:
    try:
        os.link(source, destination)
    except OSError:
        shutil.copy2(source, destination)
    return destination


def write(tree: FolderTree, path: str, text: str) -> None:
    """Replaces a file of the copy. The link is cut first: the original stays."""
    file = tree.root / path
    file.unlink(missing_ok=True)
    file.write_text(text)


def edit(tree: FolderTree, target: str, old: str, new: str) -> None:
    """Replaces `old` by `new`, once, inside the definition of a target."""
    definition = defined(tree, target)
    first, last = definition.lines
    lines = (tree.root / definition.path).read_text().splitlines(keepends=True)
    body = "".join(lines[first - 1 : last])
    assert body.count(old) == 1, f"{target}: {body.count(old)} times {old!r}"
    write(tree, definition.path, "".join(lines[: first - 1]) + body.replace(old, new) + "".join(lines[last:]))


def remove(tree: FolderTree, target: str) -> str:
    """Takes a definition out of its file and returns its text."""
    definition = defined(tree, target)
    first, last = definition.lines
    lines = (tree.root / definition.path).read_text().splitlines(keepends=True)
    write(tree, definition.path, "".join(lines[: first - 1]) + "".join(lines[last:]))
    return "".join(lines[first - 1 : last])


def defined(tree: FolderTree, target: str) -> Definition:
    """Reads files anew: the copy may have changed since."""
    definition = locate(FolderTree(tree.root), target)
    assert definition is not None, target
    return definition
