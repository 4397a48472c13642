"""The documentation: commands run, tables equal the code, links resolve, the site builds."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from scripts.upstream_tools.targets import REPOSITORY
from sglang_dcp.cli.commands import COMMANDS
from sglang_dcp.config import DynCpConfig, add_cli_arguments

DOCUMENTS = [*sorted((REPOSITORY / "docs").rglob("*.md")), REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md"]
BLOCK = re.compile(r"(?:^<!-- (run|by hand: [^>]+) -->\n)?^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
OUR_MODULES = ("benchmark.", "scripts.", "testing.")
OTHER_PROGRAMS = ("docker", "export", "pip", "sglang.bench_serving", "guidellm", "aiperf", "evalscope", "inference-perf")
SHELLS = ("bash", "sh", "shell", "console", "")


@dataclass(frozen=True)
class Block:
    """Shell commands of a document. mark: "run", "by hand: REASON", or "" where the mark is missing."""

    document: str
    mark: str
    commands: tuple[str, ...]


def read_blocks(document: str, text: str) -> list[Block]:
    """A fence without a language is taken for commands: it looks the same to a reader."""
    return [Block(document, mark, read_commands(body)) for mark, language, body in BLOCK.findall(text) if language in SHELLS]


def read_commands(body: str) -> tuple[str, ...]:
    """Continued lines joined, remarks left out."""
    lines = (re.sub(r"(?:^|\s+)#\s.*", "", line) for line in re.sub(r"\\\n\s*", "", body).splitlines())
    return tuple(line for line in lines if line.strip())


def blocks() -> list[Block]:
    return [block for path in DOCUMENTS for block in read_blocks(path.relative_to(REPOSITORY).as_posix(), path.read_text())]


RUN = sorted({(block.document, command) for block in blocks() if block.mark == "run" for command in block.commands})
BY_HAND = sorted({(block.document, command) for block in blocks() if block.mark.startswith("by hand") for command in block.commands})


@functools.cache
def shell(command: str) -> subprocess.CompletedProcess[str]:
    """Runs a command as a reader would: in the repository's root, with the environment's programs first."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return subprocess.run(
        ["bash", "-c", command], cwd=REPOSITORY, env={**os.environ, "PATH": path}, capture_output=True, text=True, timeout=250, check=False
    )


def test_every_block_of_commands_is_marked() -> None:
    assert [block.document for block in blocks() if not block.mark] == []
    assert len(RUN) > 10


@pytest.mark.parametrize(("document", "command"), RUN)
def test_a_documented_command_runs(document: str, command: str) -> None:
    result = shell(command)
    assert result.returncode == 0, f"{document}: {command}\n{result.stdout[-800:]}\n{result.stderr[-800:]}"


SHOWN = re.compile(r"^<!-- run -->\n```bash\n(.*?)^```\n\n```text\n(.*?)^```", re.MULTILINE | re.DOTALL)


def test_what_a_page_shows_is_what_the_command_prints() -> None:
    """Lines may be left out, none may differ."""
    shown = [match for path in DOCUMENTS for match in SHOWN.findall(path.read_text())]
    assert shown
    for body, text in shown:
        printed = shell(read_commands(body)[-1]).stdout.splitlines()
        assert [line for line in text.splitlines() if line not in printed] == []


def our_flags() -> set[str]:
    import argparse

    parser = argparse.ArgumentParser()
    add_cli_arguments(parser)
    return {flag for action in parser._actions for flag in action.option_strings if flag.startswith(("--dyncp", "--enable-dyncp"))}


def program_text(script: Path) -> str:
    """The source of a script, or of the module that it starts."""
    text = script.read_text()
    if (starts := re.search(r'run_as_module\("([\w.]+)"\)', text)) is None:
        return text
    module = REPOSITORY / starts.group(1).replace(".", "/")
    return (module / "__main__.py" if module.is_dir() else module.with_suffix(".py")).read_text()


def test_blocks_are_read() -> None:
    text = "<!-- run -->\n```\na \\\n  b   # why\n# c\n```\n```text\nout\n```\n```sh\nd\n```\n"
    assert read_blocks("page", text) == [Block("page", "run", ("a b",)), Block("page", "", ("d",))]


@pytest.mark.parametrize(("document", "command"), BY_HAND)
def test_a_command_that_is_not_run_exists(document: str, command: str) -> None:
    words = command.split()
    if words[0] == "sglang-dcp":
        assert words[1] in {c.name for c in COMMANDS}
    elif words[0] == "make":
        assert re.search(rf"^{words[1]}:", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    elif words[:2] == ["python", "-m"] and words[2].startswith(OUR_MODULES):
        module = REPOSITORY / words[2].replace(".", "/")
        assert (module / "__main__.py").exists() or module.with_suffix(".py").exists()
    elif words[0] == "cd":
        assert (REPOSITORY / words[1]).is_dir()
    elif words[0] in ("python", "bash") and words[1] != "-m":
        assert (REPOSITORY / words[1]).exists()
        text = program_text(REPOSITORY / words[1])
        assert all(f'"{word}"' in text for word in words if word.startswith("--"))
    else:
        assert words[0] in OTHER_PROGRAMS or words[2] in OTHER_PROGRAMS
    assert {word for word in words if "dyncp" in word and word.startswith("--")} <= our_flags()


def test_every_flag_is_in_the_operators_table_with_its_default() -> None:
    text = (REPOSITORY / "docs" / "operators_guide.md").read_text()
    rows = dict(re.findall(r"^\| `(--(?:enable-)?dyncp[\w-]*)` \| ([^|]+) \|", text, re.MULTILINE))
    assert set(rows) == our_flags()
    default = DynCpConfig()
    for field in (field for field in dataclasses.fields(default) if field.metadata.get("flag", True)):
        value = getattr(default, field.name)
        stated = rows[f"--dyncp-{field.name.replace('_', '-')}"].strip()
        assert stated == ("instances of a node" if field.name == "max_degree" else "none" if value is None else f"`{value}`")


def test_every_metric_is_in_the_reference() -> None:
    source = (REPOSITORY / "python" / "sglang_dcp" / "upstream" / "observe" / "metrics.py").read_text()
    names = set(re.findall(r'(?:gauge|counter|histogram)\(\s*"(\w+)"', source))
    text = (REPOSITORY / "docs" / "reference" / "metrics.md").read_text()
    assert set(re.findall(r"^\| `sglang:dyncp_(\w+)` ", text, re.MULTILINE)) == names
    assert len(names) > 5


def test_relative_links_resolve() -> None:
    result = shell("python scripts/check_links.py")
    assert result.returncode == 0, result.stdout


def test_the_site_builds_without_warnings(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="pip install mkdocs-material 'mkdocstrings[python]'")
    pytest.importorskip("mkdocstrings")
    result = shell(f"NO_MKDOCS_2_WARNING=1 python -m mkdocs build --strict --quiet --site-dir {tmp_path}")
    assert result.returncode == 0, result.stderr[-2000:]
    assert (tmp_path / "one_step" / "index.html").exists()
    assert 'class="mermaid"' in (tmp_path / "one_step" / "index.html").read_text()


def test_documents_name_no_path_of_one_machine() -> None:
    for path in DOCUMENTS:
        assert not re.search(r"/(?:work|home|root|Users)/", path.read_text()), path.name
