"""Every touch point on SGLang, as data. `docs/upstream_hooks.md` is generated from here.

`sglang_dcp.upstream.attach.install` turns these records into patches and refuses to serve when one is missing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["before", "after", "around", "replace", "add", "register", "refuse"]
HookSet = Literal["flags", "cpu", "dyncp"]


@dataclass(frozen=True)
class Hook:
    """One touch point.

    target:      dotted path in sglang; for kind "register" the registry function that the handler calls.
    kind:        before, after, around, replace: as in sglang.srt.plugins.hook_registry. "add": sets an attribute that upstream lacks.
                 "refuse": replaces a method by handler(method), which raises when it is called.
                 "register": calls the handler once, which uses an official registry.
    handler:     "module:function" of ours, imported when the set is installed.
    why:         what it is for. upstream: what would replace it there. remove_when: the observable that makes it unneeded.
    parameters:  names of the target's parameters that the handler relies on; checked at start.
    """

    target: str
    kind: Kind
    hook_set: HookSet
    handler: str
    why: str
    upstream: str
    remove_when: str
    parameters: tuple[str, ...] = ()


_NO_FLAG_SEAM = "a seam for plugin flags"

FLAGS_HOOKS: tuple[Hook, ...] = (
    Hook(
        target="sglang.srt.server_args.ServerArgs.add_cli_args",
        kind="after",
        hook_set="flags",
        handler="sglang_dcp.upstream.attach.server_args:add_flags",
        why="SGLang's own command line takes --enable-dyncp and --dyncp-*",
        upstream=_NO_FLAG_SEAM,
        remove_when="plugins can declare flags",
        parameters=("parser",),
    ),
    Hook(
        target="sglang.srt.server_args.ServerArgs.from_cli_args",
        kind="after",
        hook_set="flags",
        handler="sglang_dcp.upstream.attach.server_args:read_flags",
        why="parsed flags reach every process, and switch the dyncp set on",
        upstream=_NO_FLAG_SEAM,
        remove_when="plugins can declare flags",
        parameters=("args",),
    ),
)

DYNCP_HOOKS: tuple[Hook, ...] = (
    Hook(
        target="sglang.srt.arg_groups.resolution_hooks.register_resolution_hook",
        kind="register",
        hook_set="dyncp",
        handler="sglang_dcp.upstream.attach.settings:register_resolution",
        why="settings are completed or refused by name before anything starts",
        upstream="nothing: this is the official registry",
        remove_when="never",
        parameters=("name",),
    ),
    Hook(
        target="sglang.srt.managers.data_parallel_controller.DataParallelController.__init__",
        kind="after",
        hook_set="dyncp",
        handler="sglang_dcp.upstream.router.router:install_placement",
        why="every request gets a placement",
        upstream="a placement policy seam in the controller",
        remove_when="SGLang registers placement policies",
        parameters=(),
    ),
    Hook(
        target="sglang.srt.managers.scheduler.Scheduler.__init__",
        kind="after",
        hook_set="dyncp",
        handler="sglang_dcp.upstream.attach.scheduler:attach_instance",
        why="the scheduler process gets its ledger, transport and books",
        upstream="a scheduler extension point",
        remove_when="SGLang offers one",
        parameters=(),
    ),
    Hook(
        target="sglang.srt.managers.scheduler.Scheduler._create_generation_req",
        kind="after",
        hook_set="dyncp",
        handler="sglang_dcp.upstream.step.admission:attach_placement",
        why="the placement reaches the request",
        upstream="kv_hints consumers by action type",
        remove_when="SGLang dispatches KV-hint actions",
        parameters=("recv_req",),
    ),
    Hook(
        target="sglang.srt.managers.scheduler.Scheduler.get_next_batch_to_run",
        kind="around",
        hook_set="dyncp",
        handler="sglang_dcp.upstream.step.decode:get_next_batch",
        why="requests that got their tail page rejoin the batch",
        upstream="a parked state of requests",
        remove_when="SGLang can park requests",
        parameters=("running_batch", "last_batch"),
    ),
    Hook(
        target="sglang.srt.managers.scheduler.Scheduler.update_running_batch",
        kind="around",
        hook_set="dyncp",
        handler="sglang_dcp.upstream.step.decode:update_running_batch",
        why="a request without a tail page sits out instead of being retracted",
        upstream="a parked state of requests",
        remove_when="SGLang can park requests",
        parameters=("batch",),
    ),
    Hook(
        target="sglang.srt.managers.scheduler.Scheduler.abort_request",
        kind="after",
        hook_set="dyncp",
        handler="sglang_dcp.upstream.step.decode:after_abort",
        why="requests that sit out can be aborted",
        upstream="a parked state of requests",
        remove_when="SGLang can park requests",
        parameters=("recv_req",),
    ),
    Hook(
        target="sglang.srt.managers.scheduler.Scheduler.get_output_streamer_class",
        kind="after",
        hook_set="dyncp",
        handler="sglang_dcp.upstream.front.result:get_streamer_class",
        why="the last output of a request tells where it lived",
        upstream="nothing: this is the documented extension point",
        remove_when="never",
        parameters=(),
    ),
    Hook(
        target="sglang.srt.managers.scheduler.Scheduler.send_abort_output",
        kind="after",
        hook_set="dyncp",
        handler="sglang_dcp.upstream.front.result:after_abort_output",
        why="requests that end in the queue are in the report too",
        upstream="one place where requests end",
        remove_when="aborted requests go through the output streamer",
        parameters=("abort_req", "req"),
    ),
    Hook(
        target="sglang.srt.managers.scheduler_components.internal_state.SchedulerInternalStateController.get_internal_state",
        kind="around",
        hook_set="dyncp",
        handler="sglang_dcp.upstream.front.result:answer_report",
        why="an instance's report, built only when somebody asks",
        upstream="control requests by registration",
        remove_when="plugins can answer control requests of their own",
        parameters=("recv_req",),
    ),
    Hook(
        target="sglang.srt.managers.scheduler.Scheduler.is_fully_idle",
        kind="after",
        hook_set="dyncp",
        handler="sglang_dcp.upstream.attach.scheduler:is_fully_idle",
        why="a pool with guests is not flushed",
        upstream="an owner count in the allocator",
        remove_when="the allocator tells about foreign owners",
        parameters=("for_health_check",),
    ),
    Hook(
        target="sglang.srt.managers.scheduler_components.invariant_checker.SchedulerInvariantChecker._check_full_pool",
        kind="around",
        hook_set="dyncp",
        handler="sglang_dcp.upstream.attach.scheduler:check_full_pool",
        why="the leak check counts guest pages and reserved pages",
        upstream="an owner count in the allocator",
        remove_when="the allocator tells about foreign owners",
        parameters=("ps", "uncached"),
    ),
    Hook(
        target="sglang.srt.managers.schedule_policy.PrefillAdder.add_one_req",
        kind="around",
        hook_set="dyncp",
        handler="sglang_dcp.upstream.step.admission:add_one_req",
        why="a sharded request waits for its reservation",
        upstream="admission by a memory-budget object per request",
        remove_when="the budget is chosen per request",
        parameters=("req",),
    ),
    Hook(
        target="sglang.srt.managers.schedule_policy.PrefillAdder.add_chunked_req",
        kind="around",
        hook_set="dyncp",
        handler="sglang_dcp.upstream.step.admission:add_chunked_req",
        why="further chunks of a reserved request are paid for",
        upstream="admission by a memory-budget object per request",
        remove_when="the budget is chosen per request",
        parameters=("req",),
    ),
    Hook(
        target="sglang.srt.managers.schedule_policy.PrefillAdder._get_running_request_total_token_offset",
        kind="around",
        hook_set="dyncp",
        handler="sglang_dcp.upstream.step.admission:running_offset",
        why="a sharded request's output does not burden the home's pool alone",
        upstream="admission by a memory-budget object per request",
        remove_when="the budget is chosen per request",
        parameters=("req",),
    ),
    Hook(
        target="sglang.srt.mem_cache.allocation.alloc_paged_token_slots_extend",
        kind="around",
        hook_set="dyncp",
        handler="sglang_dcp.upstream.step.decode:alloc_extend",
        why="reserved pages are used for a sharded request's prompt",
        upstream="allocation by request in the allocator",
        remove_when="the allocator is handed requests",
        parameters=("prefix_lens_cpu", "seq_lens_cpu", "extend_num_tokens", "batch"),
    ),
    Hook(
        target="sglang.srt.mem_cache.allocation.alloc_paged_token_slots_decode",
        kind="around",
        hook_set="dyncp",
        handler="sglang_dcp.upstream.step.decode:alloc_decode",
        why="reserved pages are used for a sharded request's output",
        upstream="allocation by request in the allocator",
        remove_when="the allocator is handed requests",
        parameters=("seq_lens_cpu", "batch"),
    ),
    Hook(
        target="sglang.srt.platforms.interface.SRTPlatform.get_paged_allocator_cls",
        kind="replace",
        hook_set="dyncp",
        handler="sglang_dcp.upstream.attach.scheduler:get_allocator_class",
        why="the pool's allocator keeps the ledger",
        upstream="an allocator registry",
        remove_when="allocators can be registered",
        parameters=(),
    ),
    Hook(
        target="sglang.srt.managers.tp_worker.TpModelWorker.get_worker_info",
        kind="after",
        hook_set="dyncp",
        handler="sglang_dcp.upstream.pool.capacity:raise_worker_limits",
        why="a request may be longer than one pool",
        upstream="capacity as an allocator property",
        remove_when="the scheduler asks the allocator",
        parameters=(),
    ),
    Hook(
        target="sglang.srt.managers.scheduler_components.dp_attn.SchedulerDPAttnAdapter.prepare_mlp_sync_batch",
        kind="around",
        hook_set="dyncp",
        handler="sglang_dcp.upstream.step.sync:remember_batch",
        why="the control columns describe the step's batch",
        upstream="extra columns by registration",
        remove_when="sync columns can be registered",
        parameters=("local_batch",),
    ),
    Hook(
        target="sglang.srt.managers.scheduler_components.dp_attn.MLPSyncBatchInfo._get_local_tensor",
        kind="after",
        hook_set="dyncp",
        handler="sglang_dcp.upstream.step.sync:local_columns",
        why="control columns ride on the step's all-gather",
        upstream="extra columns by registration",
        remove_when="sync columns can be registered",
        parameters=("device",),
    ),
    Hook(
        target="sglang.srt.managers.scheduler_components.dp_attn.MLPSyncBatchInfo._get_fallback_tensor",
        kind="after",
        hook_set="dyncp",
        handler="sglang_dcp.upstream.step.sync:fallback_columns",
        why="a missing rank's row has our width",
        upstream="extra columns by registration",
        remove_when="sync columns can be registered",
        parameters=("device",),
    ),
    Hook(
        target="sglang.srt.managers.scheduler_components.dp_attn.MLPSyncBatchInfo.all_gather",
        kind="after",
        hook_set="dyncp",
        handler="sglang_dcp.upstream.step.sync:after_gather",
        why="messages, grants and row tables are settled where all ranks meet",
        upstream="extra columns by registration",
        remove_when="sync columns can be registered",
        parameters=(),
    ),
    Hook(
        target="sglang.srt.layers.attention.attention_registry.register_attention_backend",
        kind="register",
        hook_set="dyncp",
        handler="sglang_dcp.upstream.layers.attention_backend:register_backends",
        why="steps with sharded rows run our per-layer path",
        upstream="nothing: this is the official registry",
        remove_when="never",
        parameters=(),
    ),
    Hook(
        target="sglang.srt.models.deepseek_common.attention_backend_handler.AttentionBackendRegistry.register",
        kind="register",
        hook_set="dyncp",
        handler="sglang_dcp.upstream.layers.attention_backend:register_mla_form",
        why="on a GPU, MLA is absorbed in every step with sharded rows, prefill included",
        upstream="nothing: this is the official registry",
        remove_when="never",
        parameters=("backend_name", "handler_func"),
    ),
    Hook(
        target="sglang.srt.models.utils.enable_fused_set_kv_buffer",
        kind="around",
        hook_set="dyncp",
        handler="sglang_dcp.upstream.layers.attention_backend:fused_kv_write",
        why="on a GPU, the rope kernel must not write K/V of sharded rows by itself",
        upstream="the attention backend decides who writes K/V",
        remove_when="the backend is asked before a fused write",
        parameters=("forward_batch",),
    ),
    Hook(
        target="sglang.srt.model_executor.model_runner.ModelRunner.forward",
        kind="around",
        hook_set="dyncp",
        handler="sglang_dcp.upstream.layers.synthetic_prefill:skip_prefill",
        why="benchmarks of long contexts do not wait for their prompts (SGLANG_DYNCP_BENCHMARK=1 only)",
        upstream="a dummy prefill for benchmarks",
        remove_when="SGLang can skip prefills",
        parameters=("forward_batch",),
    ),
    Hook(
        target="sglang.srt.layers.attention.graph_variants.create_attention_graph_variants",
        kind="after",
        hook_set="dyncp",
        handler="sglang_dcp.upstream.layers.graphs:add_graph_variants",
        why="decode graphs are captured per number of guest rows too",
        upstream="attention backends name their graph variants",
        remove_when="a backend can return graph variants",
        parameters=("hf_config",),
    ),
    Hook(
        target="sglang.srt.managers.tp_worker.TpModelWorker.forward_batch_generation",
        kind="after",
        hook_set="dyncp",
        handler="sglang_dcp.upstream.layers.step_path:count_forward",
        why="the share of steps that ran as graphs is a metric; whether a peer was silent is noted behind the layers",
        upstream="a counter of graph replays",
        remove_when="SGLang counts them",
        parameters=(),
    ),
    Hook(
        target="sglang.srt.managers.scheduler.Scheduler.process_batch_result",
        kind="before",
        hook_set="dyncp",
        handler="sglang_dcp.upstream.layers.silence:end_if_silent",
        why="tokens of a step that a peer did not answer in are not handed out",
        upstream="a check of a result before it is processed",
        remove_when="a worker can tell that a result is not to be used",
        parameters=("batch", "result"),
    ),
)


def all_hooks() -> tuple[Hook, ...]:
    """Every touch point of every set."""
    from sglang_dcp.cpu.hooks import CPU_HOOKS
    from sglang_dcp.upstream.attach.main_hooks import DYNCP_MAIN_HOOKS

    return FLAGS_HOOKS + CPU_HOOKS + DYNCP_HOOKS + DYNCP_MAIN_HOOKS


def check_targets() -> list[str]:
    """Problems with the targets in the installed SGLang: one line each, empty when all resolve."""
    from sglang_dcp.upstream.attach.install import find_problems

    return find_problems(all_hooks())
