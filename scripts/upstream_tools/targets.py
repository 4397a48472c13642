"""What of SGLang is compared: every hook, every name that our code imports, and what it uses of SGLang's objects (WATCHED)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sglang_dcp.upstream.attach.catalogue import all_hooks
from sglang_dcp.upstream.attach.hook import Hook

REPOSITORY = Path(__file__).resolve().parents[2]
OVERLAY = REPOSITORY / "python" / "sglang_dcp"


@dataclass(frozen=True)
class Target:
    """A dotted path in sglang. must_be_called: our code there runs only because SGLang calls it. must_exist: False for what we add."""

    path: str
    origin: str
    must_be_called: bool = False
    must_exist: bool = True

    @property
    def called_name(self) -> str:
        """The name under which it is called: a constructor's is its class."""
        parts = self.path.split(".")
        return parts[-2] if parts[-1] == "__init__" else parts[-1]


_SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"
_CONTROLLER = "sglang.srt.managers.data_parallel_controller.DataParallelController"
_ALLOCATOR = "sglang.srt.mem_cache.allocator"

WATCHED: dict[str, str] = {
    f"{_SCHEDULER}._add_request_to_queue": "retracted requests queue again",
    f"{_SCHEDULER}._reqs_finishing_inflight": "who needs no page for the next token",
    f"{_SCHEDULER}._release_aborted_request": "abort of a request that sits out",
    f"{_SCHEDULER}.send_abort_output": "abort of a request that sits out",
    f"{_CONTROLLER}.maybe_external_dp_rank_routing": "a placed request goes to its home",
    f"{_CONTROLLER}.round_robin_scheduler": "requests that carry a rank already",
    "sglang.srt.managers.load_snapshot.LoadSnapshot": "the router's view of the instances",
    f"{_ALLOCATOR}.paged.PagedTokenToKVPoolAllocator.alloc_extend": "stock allocation under the ledger",
    f"{_ALLOCATOR}.paged.PagedTokenToKVPoolAllocator.alloc_decode": "stock allocation under the ledger",
    f"{_ALLOCATOR}.base.BaseTokenToKVPoolAllocator.free_segments": "overridden: pages of managed requests",
    f"{_ALLOCATOR}.base.BaseTokenToKVPoolAllocator.create_prefill_budget": "overridden: promised pages",
    f"{_ALLOCATOR}.base.BaseTokenToKVPoolAllocator.check_decode_capacity": "overridden: nothing is short",
    f"{_ALLOCATOR}.base.BaseTokenToKVPoolAllocator.max_new_tokens_for_memory": "overridden: longer than a pool",
    f"{_ALLOCATOR}.base.BaseTokenToKVPoolAllocator.evict_to_free_tokens": "room for guests",
    "sglang.srt.managers.schedule_batch.ScheduleBatch.init_new": "batches of requests that rejoin",
    "sglang.srt.managers.schedule_batch.ScheduleBatch.merge_batch": "batches of requests that rejoin",
    "sglang.srt.managers.schedule_batch.ScheduleBatch.filter_batch": "requests that sit out",
    "sglang.srt.sampling.sampling_batch_info.SamplingBatchInfo.from_schedule_batch": "batches of requests that rejoin",
    "sglang.srt.layers.attention.base_attn_backend.AttentionBackend.forward": "overridden: the per-layer path",
    "sglang.srt.mem_cache.memory_pool.MHATokenToKVPool.set_kv_buffer": "K/V rows are written",
    "sglang.srt.mem_cache.memory_pool.MLATokenToKVPool.set_kv_buffer": "K/V rows are written",
    "sglang.srt.arg_groups.choices.add_attention_backend_choices": "official list of backend names",
    "sglang.srt.managers.tp_worker.TpModelWorker.forward_batch_generation": "where a step's batch is last seen",
    "sglang.srt.managers.schedule_batch.ScheduleBatch._get_decode_retraction_order": "stock's choice of victims",
    "sglang.srt.layers.attention.graph_variants.create_attention_graph_variants": "graphs per number of attention rows",
    "sglang.srt.models.utils.enable_fused_set_kv_buffer": "on CUDA it writes K/V before attention",
    "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator._build_token_to_kv_pool_allocator": "asks for our allocator",
    "sglang.srt.plugins.load_plugins": "loads this overlay",
    "sglang.srt.server_args.prepare_server_args": "parses the command line in the main process",
}


def all_targets() -> list[Target]:
    """Sorted by path, each once; a hook wins over an import, an import over WATCHED."""
    found = {path: Target(path, f"used: {why}") for path, why in WATCHED.items()}
    found |= {path: Target(path, "imported") for path in imported_names()}
    found |= {hook.target: hook_target(hook) for hook in all_hooks()}
    return [found[path] for path in sorted(found)]


def hook_target(hook: Hook) -> Target:
    return Target(hook.target, f"hook: {hook.kind}", must_be_called=hook.kind != "register", must_exist=hook.kind != "add")


def imported_names() -> set[str]:
    """Every `from sglang... import name` of the overlay, the CPU stand-in excepted."""
    names: set[str] = set()
    for path in OVERLAY.rglob("*.py"):
        if "standin" not in path.parts:
            names |= set(_imports(ast.parse(path.read_text())))
    return names


def _imports(module: ast.Module) -> Iterator[str]:
    for node in ast.walk(module):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").split(".")[0] == "sglang":
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
