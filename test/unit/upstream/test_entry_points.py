"""The three ways to start a server take the same flags: each ends with our own message where --dyncp-* flags contradict each other."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from sglang_dcp.cpu.environment import count_cuda_devices, cpu_additions
from testing.recall import model_path
from testing.server import clean_environment

pytestmark = pytest.mark.own_process

ENTRY_POINTS = {
    "python -m sglang.launch_server": ["-m", "sglang.launch_server"],
    "sglang serve": ["-c", "from sglang.cli.main import main; main()", "serve"],
    "sglang-dcp serve": ["-m", "sglang_dcp.cli.commands", "serve"],
}
FLAGS = ["--tp", "2", "--device", "cpu", "--enable-dyncp", "--dyncp-policy", "fixed"]
MESSAGE = "sglang_dcp: --dyncp-policy fixed needs --dyncp-degree K"


@pytest.mark.parametrize("entry", ENTRY_POINTS)
def test_contradicting_flags_end_with_our_message(entry: str) -> None:
    environment = clean_environment(os.environ)
    if entry != "sglang-dcp serve":  # which sets it itself
        environment |= cpu_additions(2, environment, has_cuda_driver=count_cuda_devices() is not None)
    command = [sys.executable, *ENTRY_POINTS[entry], "--model-path", model_path("qwen3moe"), *FLAGS]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 1
    assert MESSAGE in result.stderr.splitlines(), result.stderr[-2000:]
    assert "Traceback" not in result.stderr, result.stderr[-2000:]
