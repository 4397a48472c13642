"""Compares every touch point on SGLang with the pinned release, without importing SGLang.

The pin's fingerprints are in python/sglang_dcp/upstream/attach/fingerprints.json. Exit codes: 0 all the same; 1 bodies changed; 2 a
signature changed, or a target is gone, no longer called, or (for what we add) now upstream; 3 the release could not be read.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from upstream_tools.compare import compare, exit_code, look_at, read_fingerprints, table, write_fingerprints
from upstream_tools.source_tree import FolderTree, SourceTree, WheelTree, installed_tree
from upstream_tools.targets import REPOSITORY, all_targets
from upstream_tools.wheels import DownloadError, download_wheel


def main() -> int:
    args = _parser().parse_args()
    with ExitStack() as stack:
        try:
            tree = _open_tree(args, stack)
        except (DownloadError, FileNotFoundError) as error:
            print(f"check_upstream: {error}", file=sys.stderr)
            return 3
        targets = all_targets()
        seen = look_at(tree, targets)
        if args.record:
            pin = (REPOSITORY / "UPSTREAM_VERSION").read_text().strip()
            write_fingerprints(args.version or pin, seen)
            print(f"recorded {len(targets)} targets of {tree.name}")
            return 0
        version, pinned = read_fingerprints()
        verdicts = compare(targets, pinned, seen, tree)
    print(f"{tree.name} against the pin, sglang {version}")
    print(table(verdicts, show_same=args.all))
    return exit_code(verdicts)


def _open_tree(args: argparse.Namespace, stack: ExitStack) -> SourceTree:
    if args.tree is not None:
        return FolderTree(args.tree)
    if args.version is None:
        return installed_tree()
    folder = args.wheels or Path(stack.enter_context(tempfile.TemporaryDirectory()))
    return WheelTree(download_wheel(args.version, folder), f"sglang {args.version}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--version", metavar="X", help="a release, taken from the package index; default: the installed SGLang")
    source.add_argument("--tree", type=Path, metavar="DIR", help="a checkout, an unpacked wheel or a site-packages folder")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="keep downloaded wheels here and use those that are there")
    parser.add_argument("--all", action="store_true", help="list targets that are the same, too")
    parser.add_argument("--record", action="store_true", help="write the fingerprints of the pin instead of comparing with them")
    return parser


if __name__ == "__main__":
    sys.exit(main())
