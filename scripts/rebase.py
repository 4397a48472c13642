"""Moves the pin to another SGLang release, and says what has to be looked at.

1. check: every touch point against that release, with upstream's diff around each one that is not the same (shown, not stored).
2. --branch NAME: a branch in a work tree of its own (--work-tree DIR) with the mechanical changes committed: UPSTREAM_VERSION, the pin in
   pyproject.toml, the fingerprints and docs/upstream_hooks.md.
3. --environment DIR: a fresh virtual environment with that release (11 GB). 4. --tests fast|all: the test suite in it, and what broke.

Without --branch nothing is written. Exit codes: 0 nothing to look at; 1 bodies changed; 2 a signature changed, a target is gone or a test
failed; 3 the release could not be read.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from upstream_tools.compare import FINGERPRINTS, compare, exit_code, look_at, read_fingerprints, table, write_fingerprints
from upstream_tools.rebase_steps import add_worktree, commit, failed_tests, pin_edits, report, write_edits
from upstream_tools.source_tree import FolderTree, SourceTree, WheelTree, installed_tree
from upstream_tools.targets import REPOSITORY, all_targets
from upstream_tools.wheels import DownloadError, download_wheel

DOCUMENT = "docs/upstream_hooks.md"


def main() -> int:
    parser = _parser()
    args = parser.parse_args()
    if args.tests and not args.environment:
        parser.error("--tests needs --environment DIR: the installed SGLang is the old one")
    if args.branch and not (args.onto and args.work_tree):
        parser.error("--branch needs --onto X and --work-tree DIR")
    with tempfile.TemporaryDirectory() as temporary:
        wheels = args.wheels or Path(temporary)
        try:
            new = _open(args, wheels)
            old = _open_pin(wheels)
        except (DownloadError, FileNotFoundError) as error:
            print(f"rebase: {error}", file=sys.stderr)
            return 3
        return _rebase(args, old, new)


def _rebase(args: argparse.Namespace, old: SourceTree, new: SourceTree) -> int:
    targets = all_targets()
    version, pinned = read_fingerprints()
    seen = look_at(new, targets)
    verdicts = compare(targets, pinned, seen, new)
    print(f"{new.name} against the pin, sglang {version}\n{table(verdicts)}\n")
    print(report(verdicts, old, new, diff_lines=args.diff_lines))
    code = exit_code(verdicts)
    folder = REPOSITORY
    if args.branch:
        folder = args.work_tree.resolve()
        add_worktree(REPOSITORY, args.branch, folder)
        edits = pin_edits(folder, args.onto)
        write_edits(folder, edits)
        fingerprints = FINGERPRINTS.relative_to(REPOSITORY)
        write_fingerprints(args.onto, seen, folder / fingerprints)
        document = folder / DOCUMENT
        document.write_text(document.read_text().replace(f"on SGLang {version}.", f"on SGLang {args.onto}."))
        changed = [*(edit.path for edit in edits), str(fingerprints), DOCUMENT]
        print(f"\nbranch {args.branch} in {folder}: {commit(folder, changed, f'Pin SGLang {args.onto}')}, {', '.join(changed)}")
    if args.environment:
        print(f"\ninstalling into {args.environment}", flush=True)
        subprocess.run(["bash", "scripts/setup.sh", str(args.environment.resolve())], cwd=folder, check=True)
    if args.tests:
        code = max(code, _run_tests(folder, args.environment.resolve(), args.tests))
    return code


def _run_tests(folder: Path, environment: Path, which: str) -> int:
    command = [str(environment / "bin" / "python"), "-m", "pytest", "-q"]
    command += ["-m", "not server and not gpu"] if which == "fast" else []
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    failed = failed_tests(result.stdout)
    print("\n" + result.stdout.strip().splitlines()[-1])
    print("\n".join(f"broken test: {name}" for name in failed))
    return 2 if result.returncode else 0


def _open(args: argparse.Namespace, wheels: Path) -> SourceTree:
    if args.tree is not None:
        return FolderTree(args.tree)
    return WheelTree(download_wheel(args.onto, wheels), f"sglang {args.onto}")


def _open_pin(wheels: Path) -> SourceTree:
    """The installed SGLang where it is the pin, else the pin's wheel."""
    pin = (REPOSITORY / "UPSTREAM_VERSION").read_text().strip()
    installed = installed_tree()
    return installed if installed.name.endswith(f" {pin}") else WheelTree(download_wheel(pin, wheels), f"sglang {pin}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--onto", metavar="X", help="a release, taken from the package index")
    source.add_argument("--tree", type=Path, metavar="DIR", help="SGLang sources; check and report only")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="keep downloaded wheels here and use those that are there")
    parser.add_argument("--diff-lines", type=int, default=60, metavar="N", help="most lines of upstream's diff per target (default 60)")
    parser.add_argument("--branch", metavar="NAME", help="commit the mechanical changes on a new branch")
    parser.add_argument("--work-tree", type=Path, metavar="DIR", help="where that branch is checked out")
    parser.add_argument("--environment", type=Path, metavar="DIR", help="create a virtual environment with the release")
    parser.add_argument("--tests", choices=("fast", "all"), help="run the tests in it")
    return parser


if __name__ == "__main__":
    sys.exit(main())
