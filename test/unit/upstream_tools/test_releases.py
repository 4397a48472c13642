"""Verdicts on past releases: recorded as hashes, and computed again from the package index where there is one."""

from __future__ import annotations

import importlib.metadata
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest

from scripts.upstream_tools.compare import Kind, compare, look_at, read_fingerprints
from scripts.upstream_tools.history import RECORD, RELEASES, summary
from scripts.upstream_tools.source_tree import WheelTree, installed_tree
from scripts.upstream_tools.targets import REPOSITORY, all_targets
from scripts.upstream_tools.wheels import DownloadError, download_wheel

PIN = (REPOSITORY / "UPSTREAM_VERSION").read_text().strip()
RECORDED: dict[str, dict[str, Any]] = json.loads(RECORD.read_text())

# The comparison of signatures that the design made by hand on 0.5.18, 0.5.21 and 0.5.23 (section 9 of its seam map): "=" same, "D" another
# signature, "-" missing. Its row 7 speaks about the caller of get_paged_allocator_cls, which changed in its body.
SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"
DP_ATTENTION = "sglang.srt.managers.scheduler_components.dp_attn"
SIGNATURES_BY_HAND = {
    "sglang.srt.layers.attention.attention_registry.register_attention_backend": "= = =",
    "sglang.srt.arg_groups.choices.add_attention_backend_choices": "- = =",
    "sglang.srt.models.deepseek_common.attention_backend_handler.AttentionBackendRegistry.register": "= = =",
    "sglang.srt.arg_groups.resolution_hooks.register_resolution_hook": "- = =",
    "sglang.srt.server_args.ServerArgs.add_cli_args": "= = =",
    "sglang.srt.server_args.ServerArgs.from_cli_args": "= = =",
    f"{DP_ATTENTION}.MLPSyncBatchInfo._get_local_tensor": "= = =",
    f"{DP_ATTENTION}.MLPSyncBatchInfo._get_fallback_tensor": "= = =",
    f"{DP_ATTENTION}.MLPSyncBatchInfo.all_gather": "= = =",
    f"{DP_ATTENTION}.SchedulerDPAttnAdapter.prepare_mlp_sync_batch": "= = =",
    "sglang.srt.mem_cache.allocator.paged.PagedTokenToKVPoolAllocator.alloc_extend": "= = =",
    "sglang.srt.mem_cache.allocator.paged.PagedTokenToKVPoolAllocator.alloc_decode": "= = =",
    "sglang.srt.mem_cache.allocator.base.BaseTokenToKVPoolAllocator.free_segments": "= = =",
    "sglang.srt.mem_cache.allocator.base.BaseTokenToKVPoolAllocator.check_decode_capacity": "- = =",
    "sglang.srt.mem_cache.allocator.base.BaseTokenToKVPoolAllocator.create_prefill_budget": "- = =",
    "sglang.srt.mem_cache.allocator.base.BaseTokenToKVPoolAllocator.max_new_tokens_for_memory": "- = =",
    "sglang.srt.mem_cache.allocation.alloc_paged_token_slots_extend": "= = =",
    "sglang.srt.mem_cache.allocation.alloc_paged_token_slots_decode": "= = =",
    "sglang.srt.managers.schedule_policy.PrefillAdder.add_one_req": "= = =",
    "sglang.srt.managers.schedule_policy.PrefillAdder.add_chunked_req": "= = =",
    "sglang.srt.managers.scheduler_components.invariant_checker.SchedulerInvariantChecker._check_full_pool": "= = =",
    f"{SCHEDULER}.is_fully_idle": "D = =",
    "sglang.srt.managers.data_parallel_controller.DataParallelController.__init__": "D D =",
    "sglang.srt.managers.tp_worker.TpModelWorker.forward_batch_generation": "D D =",
    f"{SCHEDULER}._create_generation_req": "- - =",
    "sglang.srt.managers.tp_worker.TpModelWorker.get_worker_info": "= = =",
    "sglang.srt.managers.schedule_batch.ScheduleBatch._get_decode_retraction_order": "D = =",
    "sglang.srt.layers.attention.graph_variants.create_attention_graph_variants": "- = =",
    "sglang.srt.models.utils.enable_fused_set_kv_buffer": "= = =",
    "sglang.srt.distributed.parallel_state.GroupCoordinator.__init__": "D D =",
    "sglang.srt.distributed.parallel_state.GroupCoordinator.reduce_scatterv": "= = =",
    "sglang.srt.distributed.parallel_state.GroupCoordinator.all_gatherv": "= = =",
    "sglang.srt.layers.moe.fused_moe_native.moe_forward_native": "= = =",
}
ALLOCATOR_CHOICE = "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator._build_token_to_kv_pool_allocator"


def symbol(version: str, target: str) -> str:
    seen, pinned = RECORDED[version][target]["seen"], RECORDED["0.5.23"][target]["seen"]
    if seen is None:
        return "-"
    return "=" if seen[0] == pinned[0] else "D"


@pytest.mark.parametrize("target", SIGNATURES_BY_HAND)
def test_signatures_agree_with_the_comparison_by_hand(target: str) -> None:
    assert " ".join(symbol(version, target) for version in ("0.5.18", "0.5.21", "0.5.23")) == SIGNATURES_BY_HAND[target]


def test_the_choice_of_the_allocator_moved_between_the_older_releases_and_the_pin() -> None:
    verdicts = [RECORDED[version][ALLOCATOR_CHOICE]["verdict"] for version in ("0.5.18", "0.5.21", "0.5.23")]
    assert verdicts[0] != "same"
    assert verdicts[2] == "same"


def test_every_release_is_recorded_and_only_the_pin_is_all_the_same() -> None:
    assert tuple(RECORDED) == RELEASES
    exit_codes = {v: max(Kind(entry["verdict"]).exit_code for entry in RECORDED[v].values()) for v in RECORDED}
    assert exit_codes == {"0.5.18": 2, "0.5.19": 2, "0.5.20": 2, "0.5.21": 2, "0.5.22": 2, "0.5.23": 0}


def test_every_release_is_recorded_for_every_target() -> None:
    """Fails after a target was added or deleted, until `python -m scripts.upstream_tools.history --wheels DIR` has run."""
    targets = {target.path for target in all_targets()}
    assert {version: set(recorded) ^ targets for version, recorded in RECORDED.items()} == {version: set() for version in RELEASES}


def test_recorded_verdicts_follow_from_the_recorded_hashes() -> None:
    for version, targets in RECORDED.items():
        for path, entry in targets.items():
            seen, pinned, verdict = entry["seen"], RECORDED["0.5.23"][path]["seen"], entry["verdict"]
            if pinned is None:
                assert seen is None, f"{version} {path}"
                continue
            assert (verdict == "gone") == (seen is None), f"{version} {path}"
            if verdict == "same":
                assert seen == pinned, f"{version} {path}"
            if seen is not None and seen[0] != pinned[0]:
                assert verdict == "signature changed", f"{version} {path}"


def test_only_hashes_of_upstream_are_stored() -> None:
    for targets in RECORDED.values():
        for entry in targets.values():
            assert set(entry) == {"verdict", "seen"}
            hashes = entry["seen"][:2] if entry["seen"] else []
            assert all(re.fullmatch("[0-9a-f]{16}", value) for value in hashes)


def test_fingerprints_cover_every_target_and_match_the_installed_release() -> None:
    """Fails after a hook or an import was added, until `python scripts/check_upstream.py --record` has run on the pinned release."""
    version, pinned = read_fingerprints()
    assert version == PIN == importlib.metadata.version("sglang")
    targets = all_targets()
    assert set(pinned) == {target.path for target in targets}
    verdicts = compare(targets, pinned, look_at(installed_tree(), targets))
    assert [v.target.path for v in verdicts if v.kind is not Kind.SAME] == []


def _wheel_folder() -> Path:
    return Path(tempfile.gettempdir()) / "sglang_dcp_wheels"


@pytest.fixture(scope="module")
def wheels() -> Path:
    folder = _wheel_folder()
    folder.mkdir(exist_ok=True)
    try:
        download_wheel("0.5.22", folder)
    except DownloadError as error:
        pytest.skip(f"no package index: {error}")
    return folder


@pytest.mark.parametrize("version", ["0.5.18", "0.5.21", "0.5.22"])
def test_a_release_from_the_package_index_gets_the_recorded_verdicts(version: str, wheels: Path) -> None:
    targets = all_targets()
    _, pinned = read_fingerprints()
    seen = look_at(WheelTree(download_wheel(version, wheels)), targets)
    got = {v.target.path: {"verdict": v.kind.value, "seen": summary(seen[v.target.path])} for v in compare(targets, pinned, seen)}
    assert got == RECORDED[version]
