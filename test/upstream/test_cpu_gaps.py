"""What SGLang lacks on a CPU is still lacking. A test that fails here is good news: remove the hook it names."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sglang_dcp.cpu.environment import count_cuda_devices, cpu_additions

pytestmark = pytest.mark.own_process

PROBE = Path(__file__).parent / "cpu_gap_probe.py"


def run_python(*arguments: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SGLANG_") and name != "PYTHONPATH"}
    return subprocess.run([sys.executable, *arguments], env=clean | environment, capture_output=True, text=True, timeout=240, check=False)


@pytest.fixture(scope="module")
def probe() -> dict[str, Any]:
    """Outcomes in a process with the environment of `sglang-dcp serve` and no hook of ours."""
    environment = cpu_additions(1, {}, has_cuda_driver=count_cuda_devices() is not None)
    result = run_python(str(PROBE), environment=environment)
    lines = [line for line in result.stdout.splitlines() if line.startswith("PROBE ")]
    assert lines, f"the probe did not finish:\n{result.stderr[-2000:]}"
    return dict(json.loads(lines[0].removeprefix("PROBE ")))


def test_environment_selects_the_cpu_without_amx_kernels(probe: dict[str, Any]) -> None:
    """Not a gap but its counterpart: the stand-in must not make SGLang believe in kernels that are not there."""
    assert probe["is_cpu"] is True
    assert probe["amx"] is False


@pytest.mark.skipif(count_cuda_devices() is not None, reason="with a CUDA driver the real sgl_kernel loads")
def test_sgl_kernel_cannot_be_imported_without_a_cuda_driver() -> None:
    """Closed when this fails: remove python/sglang_dcp/cpu/standin."""
    assert run_python("-c", "import sgl_kernel", environment={}).returncode != 0


def test_sgl_kernel_is_needed_to_import_the_allocator_on_a_cpu() -> None:
    """Closed when mem_cache/allocation.py no longer asks for it: then the stand-in may be unnecessary."""
    code = "import sys; sys.modules['sgl_kernel'] = None\nimport sglang.srt.mem_cache.allocation"
    result = run_python("-c", code, environment={"SGLANG_USE_CPU_ENGINE": "1"})
    assert result.returncode != 0
    assert "sgl_kernel" in result.stderr


def test_groups_ask_for_nccl_on_a_cpu(probe: dict[str, Any]) -> None:
    """Hook: GroupCoordinator.__init__."""
    assert probe["default_use_pynccl"] is True


def test_reduce_scatterv_needs_nccl(probe: dict[str, Any]) -> None:
    """Hook: GroupCoordinator.reduce_scatterv."""
    assert probe["reduce_scatterv"].startswith("AttributeError: 'NoneType' object has no attribute 'change_state'")


def test_all_gatherv_needs_nccl(probe: dict[str, Any]) -> None:
    """Hook: GroupCoordinator.all_gatherv."""
    assert probe["all_gatherv"].startswith("AttributeError: 'NoneType' object has no attribute 'change_state'")


def test_native_experts_cannot_take_foreign_experts(probe: dict[str, Any]) -> None:
    """Hook: fused_moe_native.moe_forward_native."""
    assert probe["native_experts"].startswith("RuntimeError: index -1 is out of bounds")


def test_torch_native_has_no_fill_value(probe: dict[str, Any]) -> None:
    """Hook: TorchNativeAttnBackend.get_cpu_graph_seq_len_fill_value (added)."""
    assert probe["torch_native_fill_value"] is False


def test_torch_native_has_no_mla_handler(probe: dict[str, Any]) -> None:
    """Hook: AttentionBackendRegistry.register."""
    assert probe["torch_native_mla_handler"] is False


def test_the_router_polls_without_waiting(probe: dict[str, Any]) -> None:
    """Hook: DataParallelController.event_loop."""
    assert probe["router_polls_without_waiting"] is True


def test_kv_heads_are_padded_by_the_wrong_group_size(probe: dict[str, Any]) -> None:
    """No hook: the test models have 4 KV heads. Closed when heads are counted per attention rank; then 2 would do."""
    assert probe["kv_heads_of_two_on_four_ranks"] == 4


def test_rope_on_a_cpu_knows_yarn_only(probe: dict[str, Any]) -> None:
    """No hook: the DeepSeek test model has yarn scaling. Closed when get_rope_cpu takes plain rope."""
    assert probe["rope_without_yarn"].startswith("AssertionError")


def test_the_probe_ran_on_the_pinned_version() -> None:
    pin = (Path(__file__).resolve().parents[2] / "UPSTREAM_VERSION").read_text().strip()
    assert importlib.metadata.version("sglang") == pin
