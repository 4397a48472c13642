"""Every relative link in the Markdown files must lead to a file, and its #anchor to a heading."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)(?:\s+\"[^\"]*\")?\)")
HEADING = re.compile(r"^#{1,6}\s+(.*)$", re.MULTILINE)
CODE = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)


def markdown_files() -> list[Path]:
    """Markdown files under version control or about to be."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"]
    names = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.split()
    return [REPOSITORY / name for name in names if (REPOSITORY / name).exists()]


def anchor(heading: str) -> str:
    """The anchor that GitHub gives to a heading."""
    text = re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower())
    return text.strip().replace(" ", "-")


def broken_links(path: Path) -> list[str]:
    problems = []
    for target in LINK.findall(CODE.sub("", path.read_text())):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, fragment = target.partition("#")
        destination = (path.parent / name).resolve() if name else path
        if not destination.exists():
            problems.append(f"{path.relative_to(REPOSITORY)}: {target} does not exist")
        elif fragment and destination.suffix == ".md" and fragment not in map(anchor, HEADING.findall(destination.read_text())):
            problems.append(f"{path.relative_to(REPOSITORY)}: no heading for {target}")
    return problems


def main() -> int:
    files = markdown_files()
    problems = [problem for path in files for problem in broken_links(path)]
    print("\n".join(problems) if problems else f"links of {len(files)} Markdown files resolve")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
