"""SGLang's sources, read without importing them: from a folder (checkout, unpacked wheel, site-packages) or straight from a wheel."""

from __future__ import annotations

import ast
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

PACKAGE = "sglang"


class SourceTree:
    """`name` is what reports call it. Paths are relative to the folder that holds the package: "sglang/srt/server_args.py"."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._parsed: dict[str, ast.Module] = {}

    def paths(self) -> Iterator[str]:
        """Every Python file of the package."""
        raise NotImplementedError

    def read(self, path: str) -> str | None:
        """Text of a file, None where there is none."""
        raise NotImplementedError

    def parse(self, path: str) -> ast.Module:
        if path not in self._parsed:
            text = self.read(path)
            if text is None:
                raise FileNotFoundError(f"{path} is not in {self.name}")
            self._parsed[path] = ast.parse(text, filename=path)
        return self._parsed[path]

    def module_path(self, module: str) -> str | None:
        """File of a dotted module, None where there is none."""
        base = module.replace(".", "/")
        return next((path for path in (f"{base}.py", f"{base}/__init__.py") if self.read(path) is not None), None)


class FolderTree(SourceTree):
    def __init__(self, folder: Path, name: str | None = None) -> None:
        """folder: holds `sglang/`, or is a checkout that has it under `python/`, or is the package itself."""
        candidates = (folder, folder / "python", folder.parent)
        root = next((path for path in candidates if (path / PACKAGE / "srt").is_dir()), None)
        if root is None or (root == folder.parent and folder.name != PACKAGE):
            raise FileNotFoundError(f"--tree {folder}: no {PACKAGE}/srt in it, nor under python/")
        super().__init__(name or str(folder))
        self.root = root
        self._texts: dict[str, str | None] = {}

    def paths(self) -> Iterator[str]:
        for path in sorted((self.root / PACKAGE).rglob("*.py")):
            yield path.relative_to(self.root).as_posix()

    def read(self, path: str) -> str | None:
        if path not in self._texts:
            file = self.root / path
            self._texts[path] = file.read_text(encoding="utf-8") if file.is_file() else None
        return self._texts[path]


class WheelTree(SourceTree):
    def __init__(self, wheel: Path, name: str | None = None) -> None:
        super().__init__(name or wheel.name)
        self._archive = zipfile.ZipFile(wheel)
        self._names = {entry for entry in self._archive.namelist() if entry.startswith(f"{PACKAGE}/") and entry.endswith(".py")}

    def paths(self) -> Iterator[str]:
        yield from sorted(self._names)

    def read(self, path: str) -> str | None:
        return self._archive.read(path).decode("utf-8") if path in self._names else None


def installed_tree() -> FolderTree:
    """The SGLang of this environment, found by its metadata, not imported."""
    import importlib.metadata

    distribution = importlib.metadata.distribution(PACKAGE)
    return FolderTree(Path(str(distribution.locate_file(""))), f"installed {PACKAGE} {distribution.version}")


def called_names(tree: SourceTree, names: set[str]) -> set[str]:
    """Those of `names` that some file of the package calls, as a function or as a method."""
    left = set(names)
    found: set[str] = set()
    for path in tree.paths():
        if not left:
            break
        if "/test/" in path:
            continue
        text = tree.read(path) or ""
        hits = {name for name in left if f"{name}(" in text}
        if hits:
            called = _calls(text, hits)
            found |= called
            left -= called
    return found


def _calls(text: str, names: set[str]) -> set[str]:
    pattern = re.compile(r"(?<!def )(?<!class )(?<![A-Za-z0-9_])(" + "|".join(map(re.escape, sorted(names))) + r")\(")
    return {match.group(1) for line in text.splitlines() if not line.lstrip().startswith("#") for match in pattern.finditer(line)}
