"""Every staged change applies to a copy of the installed release, and closes its gap there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from unit.upstream_tools.sglang_copy import copy_sglang, edit

from scripts.upstream_tools.codemod import CodemodError, EditedTree
from scripts.upstream_tools.contributions import ALL
from scripts.upstream_tools.contributions.page import DOCUMENT, render
from scripts.upstream_tools.source_tree import installed_tree
from scripts.upstream_tools.targets import REPOSITORY
from sglang_dcp.cpu.environment import count_cuda_devices, cpu_additions

GAP_PROBE = REPOSITORY / "test" / "upstream" / "cpu_gap_probe.py"
SEAM_PROBE = Path(__file__).parent / "seam_probe.py"


@pytest.fixture(scope="module")
def patched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of SGLang with every patch applied by `git apply`, one after the other."""
    folder = tmp_path_factory.mktemp("patched")
    tree = copy_sglang(folder)
    for contribution in ALL:
        edited = EditedTree(type(tree)(folder))
        contribution.apply(edited)
        patch = edited.patch()
        for path in re.findall(r"^--- a/(.+)$", patch, re.MULTILINE):
            # A hard link to the original: git writes through none, but make sure.
            text = (folder / path).read_text()
            (folder / path).unlink()
            (folder / path).write_text(text)
        environment = {**os.environ, "GIT_CEILING_DIRECTORIES": "/"}
        subprocess.run(["git", "apply", "-"], cwd=folder, input=patch, text=True, check=True, env=environment)
    return folder


def probe(script: Path, folder: Path) -> dict[str, Any]:
    """Outcomes of a probe that imports SGLang from `folder`, without any hook of ours."""
    environment = cpu_additions(1, {}, has_cuda_driver=count_cuda_devices() is not None)
    environment["PYTHONPATH"] = os.pathsep.join([str(folder), environment.get("PYTHONPATH", "")])
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SGLANG_") and name != "PYTHONPATH"}
    command = [sys.executable, str(script)]
    result = subprocess.run(command, env=clean | environment, capture_output=True, text=True, timeout=280, check=False)
    lines = [line for line in result.stdout.splitlines() if line.startswith("PROBE ")]
    assert lines, result.stderr[-2000:]
    return dict(json.loads(lines[0].removeprefix("PROBE ")))


@pytest.fixture(scope="module")
def gaps(patched: Path) -> dict[str, Any]:
    return probe(GAP_PROBE, patched)


@pytest.fixture(scope="module")
def seams(patched: Path) -> dict[str, Any]:
    return probe(SEAM_PROBE, patched)


@pytest.mark.own_process
@pytest.mark.parametrize(
    ("outcome", "closed"),
    [
        ("default_use_pynccl", False),
        ("reduce_scatterv", "works"),
        ("all_gatherv", "works"),
        ("native_experts", "works"),
        ("torch_native_fill_value", True),
        ("torch_native_mla_handler", True),
        ("router_polls_without_waiting", False),
    ],
)
def test_a_gap_on_the_cpu_is_closed(outcome: str, closed: Any, gaps: dict[str, Any]) -> None:
    assert gaps[outcome] == closed


@pytest.mark.own_process
def test_the_allocator_loads_without_sgl_kernel(patched: Path) -> None:
    """Closes test_sgl_kernel_is_needed_to_import_the_allocator_on_a_cpu."""
    code = "import sys; sys.modules['sgl_kernel'] = None\nimport sglang.srt.mem_cache.allocation as a; print(a.__file__)"
    environment = {**os.environ, "SGLANG_USE_CPU_ENGINE": "1", "PYTHONPATH": str(patched)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, result.stderr[-1500:]
    assert str(patched) in result.stdout


@pytest.mark.own_process
@pytest.mark.parametrize(
    "outcome",
    [
        "imported_from_the_copy",
        "experts_of_two_ranks_add_up",
        "fused_experts_of_two_ranks_are_the_checkpoint",
        "collectives_of_two_ranks",
        "flags_of_a_plugin_are_parsed_and_read",
        "parser_without_plugins_is_as_before",
        "a_check_refuses_custom_params",
        "custom_params_pass_without_checks",
        "placed_requests_go_to_their_rank",
        "unplaced_requests_go_round_robin",
        "idle_ranks_are_raised_when_asked",
        "no_rank_is_raised_when_all_are_idle",
        "halves_merged_by_lse_equal_the_whole",
        "decode_without_lse_is_as_before",
        "heads_are_counted_per_attention_rank",
        "plain_rope_rotates",
        "rows_are_written_without_the_kernel",
        "a_decode_plan_waits_for_the_copy_of_the_last_one",
        "sampling_values_out_of_range_are_refused",
        "sampling_values_in_range_pass",
        "prompts_out_of_range_are_refused",
        "prompts_in_range_pass",
    ],
)
def test_a_seam_works(outcome: str, seams: dict[str, Any]) -> None:
    assert seams[outcome] is True, seams[outcome]


def test_the_installed_release_was_not_touched(patched: Path) -> None:
    for contribution in ALL:
        edited = EditedTree(installed_tree())
        contribution.apply(edited)
        assert edited.patch()


def test_a_change_that_does_not_fit_names_its_place(tmp_path: Path) -> None:
    tree = copy_sglang(tmp_path, only_sources=True)
    edit(tree, "sglang.srt.layers.moe.fused_moe_native.moe_forward_native", "topk_ids, _ = topk_output", "topk_ids, unused = topk_output")
    experts = next(c for c in ALL if c.name == "cpu-experts")
    with pytest.raises(CodemodError, match="moe_forward_native: 0 statements start with"):
        experts.apply(EditedTree(type(tree)(tmp_path)))


def test_a_patch_of_a_checkout_has_its_prefix(tmp_path: Path) -> None:
    copy_sglang(tmp_path / "python", only_sources=True)
    command = [sys.executable, "scripts/stage_upstream.py", "cpu-experts", "--tree", str(tmp_path)]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert "--- a/python/sglang/srt/layers/moe/fused_moe_native.py" in result.stdout


def test_the_document_equals_the_contributions() -> None:
    """Fails after a text was changed, until `python scripts/stage_upstream.py --docs` has run."""
    assert DOCUMENT.read_text() == render()


def test_no_patch_is_stored() -> None:
    stored = subprocess.run(["git", "ls-files", "*.patch", "*.diff"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    assert stored == ""
