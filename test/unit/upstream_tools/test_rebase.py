"""Six changes seeded into a copy of the pinned release: each must be reported by name. And the mechanical steps of a rebase."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from unit.upstream_tools.sglang_copy import copy_sglang, edit, remove, write

from scripts.upstream_tools.rebase_steps import PIN_FILE, PROJECT_FILE, add_worktree, commit, failed_tests, pin_edits, run, write_edits
from scripts.upstream_tools.targets import REPOSITORY

ADDER = "sglang.srt.managers.schedule_policy.PrefillAdder.add_chunked_req"
SLOTS = "sglang.srt.mem_cache.allocation.alloc_paged_token_slots_decode"
IDLE = "sglang.srt.managers.scheduler.Scheduler.is_fully_idle"
CHECKER = "sglang.srt.managers.scheduler_components.invariant_checker.SchedulerInvariantChecker"
SYNC = "sglang.srt.managers.scheduler_components.dp_attn.MLPSyncBatchInfo"
CREATE = "sglang.srt.managers.scheduler.Scheduler._create_generation_req"


ONE_EACH = {
    ADDER: ("signature changed", "parameter req renamed to request or replaced by it"),
    SLOTS: ("gone", "a definition of that name is at sglang.srt.mem_cache.decode_slots.alloc_paged_token_slots_decode"),
    IDLE: ("body changed", ""),
    f"{CHECKER}._check_full_pool": ("gone", ""),
    f"{SYNC}._get_local_tensor": ("body changed", "sync columns: 11 -> 12"),
    CREATE: ("signature changed", "new required parameter tenant"),
}


@pytest.fixture(scope="module")
def seeded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A renamed parameter, a moved function, a changed body, a removed class, an extra sync column, a new required argument."""
    folder = tmp_path_factory.mktemp("seeded")
    tree = copy_sglang(folder, only_sources=True)
    edit(tree, ADDER, "(self, req: Req", "(self, request: Req")
    moved = remove(tree, SLOTS)
    write(tree, "sglang/srt/mem_cache/decode_slots.py", f"import torch\n\n\n{moved}")
    edit(tree, IDLE, "if not ignore_waiting:", "if ignore_waiting is False:")
    remove(tree, CHECKER)
    edit(tree, f"{SYNC}._get_local_tensor", "self.attention_pairs,", "self.attention_pairs,\n                0,")
    edit(tree, f"{SYNC}._get_fallback_tensor", "0,  # attention_pairs", "0,\n                0,")
    edit(tree, CREATE, "self, recv_req: TokenizedGenerateReqInput,", "self, recv_req: TokenizedGenerateReqInput, tenant: str,")
    return folder


def script(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, f"scripts/{name}", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=200, check=False)


@pytest.fixture(scope="module")
def rebased(seeded: Path) -> subprocess.CompletedProcess[str]:
    return script("rebase.py", "--tree", str(seeded))


@pytest.mark.parametrize("target", ONE_EACH)
def test_each_seeded_change_is_reported_by_name(target: str, rebased: subprocess.CompletedProcess[str]) -> None:
    verdict, detail = ONE_EACH[target]
    lines = rebased.stdout.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith(f"{verdict:<18} {target} "))
    if detail:
        assert lines[at + 1].strip() == detail


def test_nothing_but_the_seeded_changes_is_reported(rebased: subprocess.CompletedProcess[str]) -> None:
    reported = {line.split()[1].rstrip(":") for line in rebased.stdout.splitlines() if line.startswith("== ")}
    assert reported == {*ONE_EACH, f"{SYNC}._get_fallback_tensor"}
    assert rebased.returncode == 2, rebased.stderr


def test_upstreams_diff_is_shown_around_each_broken_target(rebased: subprocess.CompletedProcess[str]) -> None:
    assert "   -        if not ignore_waiting:" in rebased.stdout
    assert "   +        if ignore_waiting is False:" in rebased.stdout
    assert "   +        self, recv_req: TokenizedGenerateReqInput, tenant: str," in rebased.stdout


def test_check_upstream_agrees(seeded: Path) -> None:
    result = script("check_upstream.py", "--tree", str(seeded))
    assert result.returncode == 2
    assert all(target in result.stdout for target in ONE_EACH)


def test_a_hook_that_nothing_calls_any_more_is_reported(tmp_path: Path) -> None:
    tree = copy_sglang(tmp_path, only_sources=True)
    edit(tree, "sglang.srt.managers.schedule_policy.PrefillAdder.add_one_req", "def add_one_req(", "def add_one_req_unused(")
    for path in list(tree.paths()):
        text = tree.read(path) or ""
        if ".get_worker_info(" in text:
            write(tree, path, text.replace(".get_worker_info(", ".other_worker_info("))
    result = script("check_upstream.py", "--tree", str(tmp_path))
    assert "no longer called   sglang.srt.managers.tp_worker.TpModelWorker.get_worker_info" in result.stdout
    assert "gone               sglang.srt.managers.schedule_policy.PrefillAdder.add_one_req" in result.stdout


def test_a_layout_change_alone_is_the_same(tmp_path: Path) -> None:
    tree = copy_sglang(tmp_path, only_sources=True)
    edit(tree, IDLE, "if not ignore_waiting:", "# a new comment\n        if (not ignore_waiting):")
    result = script("check_upstream.py", "--tree", str(tmp_path))
    assert result.returncode == 0
    assert " 0 body changed, 0 signature changed" in result.stdout


def test_a_folder_without_sglang_is_refused(tmp_path: Path) -> None:
    result = script("check_upstream.py", "--tree", str(tmp_path))
    assert result.returncode == 3
    assert f"--tree {tmp_path}: no sglang/srt in it" in result.stderr


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A small repository with a pin."""
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / PIN_FILE).write_text("0.5.23\n")
    (folder / PROJECT_FILE).write_text('dependencies = ["sglang==0.5.23"]\n')
    for command in ("init -q", "config user.email a@b", "config user.name a", "add .", "commit -qm first"):
        run(["git", *command.split()], folder)
    return folder


def test_the_pin_moves_on_a_branch_of_its_own(repository: Path, tmp_path: Path) -> None:
    folder = tmp_path / "work_tree"
    add_worktree(repository, "rebase-0.5.24", folder)
    write_edits(folder, pin_edits(folder, "0.5.24"))
    first = commit(folder, [PIN_FILE, PROJECT_FILE], "Pin SGLang 0.5.24")
    assert commit(folder, [PIN_FILE, PROJECT_FILE], "Pin SGLang 0.5.24") == first, "nothing changed the second time"
    assert run(["git", "show", "rebase-0.5.24:UPSTREAM_VERSION"], repository) == "0.5.24\n"
    assert "sglang==0.5.24" in run(["git", "show", "rebase-0.5.24:pyproject.toml"], repository)
    assert (repository / PIN_FILE).read_text() == "0.5.23\n"
    assert run(["git", "status", "--porcelain"], repository) == ""


def test_a_project_without_a_single_pin_is_refused(repository: Path) -> None:
    (repository / PROJECT_FILE).write_text('dependencies = ["sglang>=0.5"]\n')
    with pytest.raises(ValueError, match="expected one pin"):
        pin_edits(repository, "0.5.24")


def test_a_git_command_that_fails_says_why(repository: Path) -> None:
    with pytest.raises(RuntimeError, match="exit code"):
        add_worktree(repository, "bad..name", repository / "elsewhere")


def test_broken_tests_are_read_from_pytests_summary() -> None:
    output = "FAILED test/a.py::test_b - assert 1\nERROR test/c.py::test_d\n2 passed"
    assert failed_tests(output) == ["test/a.py::test_b", "test/c.py::test_d"]


def test_tests_without_an_environment_are_refused() -> None:
    result = script("rebase.py", "--onto", "0.5.24", "--tests", "fast")
    assert result.returncode == 2
    assert "--tests needs --environment" in result.stderr
