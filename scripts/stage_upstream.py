"""Makes patches of changes that belong in SGLang, against any SGLang tree. Patches are generated, never stored here.

Without --output they are printed. Apply one in the checkout with `git apply`. Exit code 1: a change does not fit the tree; its place
is named.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from upstream_tools.codemod import CodemodError, Contribution, EditedTree
from upstream_tools.contributions import ALL
from upstream_tools.contributions.page import DOCUMENT, render
from upstream_tools.source_tree import FolderTree, installed_tree


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: all of {', '.join(c.name for c in ALL)}")
    parser.add_argument("--tree", type=Path, metavar="DIR", help="SGLang sources; default: the installed ones")
    parser.add_argument("--output", type=Path, metavar="DIR", help="write NAME.patch files there")
    parser.add_argument("--list", action="store_true", help="list the changes")
    parser.add_argument("--docs", action="store_true", help="write docs/upstream_contributions.md")
    args = parser.parse_args()
    unknown = set(args.names) - {c.name for c in ALL}
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    chosen = [c for c in ALL if not args.names or c.name in args.names]
    if args.list:
        print("\n".join(f"{c.name:<20} {c.title}" for c in chosen))
        return 0
    if args.docs:
        DOCUMENT.write_text(render())
        return 0
    return _stage(chosen, args.tree, args.output)


def _stage(chosen: list[Contribution], folder: Path | None, output: Path | None) -> int:
    tree = FolderTree(folder) if folder else installed_tree()
    prefix = "python/" if folder and tree.root == folder / "python" else ""
    code = 0
    for contribution in chosen:
        edited = EditedTree(tree)
        try:
            contribution.apply(edited)
        except CodemodError as error:
            print(f"stage_upstream: {contribution.name} does not fit {tree.name}: {error}", file=sys.stderr)
            code = 1
            continue
        if output is None:
            print(edited.patch(prefix), end="")
        else:
            output.mkdir(parents=True, exist_ok=True)
            (output / f"{contribution.name}.patch").write_text(edited.patch(prefix))
            print(f"{output / contribution.name}.patch")
    return code


if __name__ == "__main__":
    sys.exit(main())
