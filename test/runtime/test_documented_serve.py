"""The documentation's serve command starts as it is written: with a tiny model for MODEL, two instances, and a pool that fits anywhere."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass

import pytest

from testing.documentation import serve_lines
from testing.recall import model_path
from testing.server import ServerConfig, ServerPool


@dataclass(frozen=True)
class DocumentedServe(ServerConfig):
    """A server that is started by a documented line."""

    line: str = ""

    def command(self, port: int, node: int = 0) -> list[str]:
        words = [model_path(self.model) if word == "MODEL" else word for word in shlex.split(self.line)]
        assert words[:2] == ["sglang-dcp", "serve"]
        words[words.index("--tp") + 1] = str(self.instances)
        here = ["--port", str(port), "--max-total-tokens", str(self.pool_tokens)]
        return [sys.executable, "-m", "sglang_dcp.cli.commands", *words[1:], *here]


ALONE = [line for line in serve_lines() if "--disaggregation-mode" not in line and "--nnodes" not in line]
"""Prefill and decode servers come in pairs (test_disaggregated.py), hosts with others."""


@pytest.mark.parametrize("line", ALONE)
def test_a_documented_line_serves(pool: ServerPool, line: str) -> None:
    server = pool.get(DocumentedServe("qwen3moe", instances=2, pool_tokens=2048, dyncp=True, line=line))
    answer = server.client.generate([1 + place % 90 for place in range(600)], max_new_tokens=4, sampling={"ignore_eos": True})
    assert len(answer.ids) == 4 and "dyncp" in answer.meta
    assert server.client.chat("hello", max_tokens=4)["choices"][0]["finish_reason"] in ("length", "stop")
    assert "dyncp: --page-size 16" in server.log(), "what is completed is said"
