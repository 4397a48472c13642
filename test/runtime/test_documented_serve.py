"""The documentation's serve command starts as it is written: with a tiny model for MODEL, two instances, and a pool that fits anywhere."""

from __future__ import annotations

import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from support.recall import model_path
from support.server import ServerConfig

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
OPTIONAL = re.compile(r"\s*\[[^\]]*\]\s*$")
SERVE = ("sglang-dcp serve --model-path", "sglang serve", "python -m sglang.launch_server")


def serve_lines() -> list[str]:
    """Every serve command of a block, without what it says may follow."""
    blocks = (block for page in PAGES for block in re.findall(r"```[a-z]*\n(.*?)```", page.read_text(), re.DOTALL))
    lines = (OPTIONAL.sub("", line.split("#")[0]).strip() for block in blocks for line in block.splitlines())
    return sorted({line for line in lines if line.startswith(SERVE)})


@dataclass(frozen=True)
class DocumentedServe(ServerConfig):
    """A server that is started by a documented line."""

    line: str = ""

    def command(self, port: int) -> list[str]:
        words = [model_path(self.model) if word == "MODEL" else word for word in shlex.split(self.line)]
        assert words[:2] == ["sglang-dcp", "serve"]
        words[words.index("--tp") + 1] = str(self.instances)
        here = ["--port", str(port), "--max-total-tokens", str(self.pool_tokens)]
        return [sys.executable, "-m", "sglang_dcp.cli.commands", *words[1:], *here]


def test_one_line_stands_for_all() -> None:
    assert serve_lines() == ["sglang-dcp serve --model-path MODEL --tp 8 --enable-dyncp"]


@pytest.mark.parametrize("line", serve_lines())
def test_a_documented_line_serves(serve, line: str) -> None:
    server = serve(DocumentedServe("qwen3moe", instances=2, pool_tokens=2048, dyncp=True, line=line))
    answer = server.client.generate([1 + place % 90 for place in range(600)], max_new_tokens=4, sampling={"ignore_eos": True})
    assert len(answer.ids) == 4 and "dyncp" in answer.meta
    assert server.client.chat("hello", max_tokens=4)["choices"][0]["finish_reason"] in ("length", "stop")
    assert "dyncp: --page-size 16" in server.log(), "what is completed is said"
