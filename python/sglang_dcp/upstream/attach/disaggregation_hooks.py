"""Touch points of disaggregated serving: of a decode server, installed with the set `dyncp` and called with --disaggregation-mode decode
alone; and of a prefill server of SGLang's (set `pd`)."""

from __future__ import annotations

from sglang_dcp.upstream.attach.hook import Hook

_DECODE = "sglang.srt.disaggregation.decode"
_QUEUE = f"{_DECODE}.DecodePreallocQueue"
_RECEIVER = "sglang.srt.disaggregation.common.conn.CommonKVReceiver"
_MOONCAKE = "sglang.srt.disaggregation.mooncake.conn"
_ROOM = "sglang_dcp.upstream.disaggregation"
_BUDGET = "admission by a memory-budget object per request"
_BUDGET_THERE = "the budget is chosen per request"

DISAGGREGATION_HOOKS: tuple[Hook, ...] = (
    Hook(
        target=f"{_DECODE}.SchedulerDisaggregationDecodeMixin.get_next_disagg_decode_batch_to_run",
        kind="around",
        hook_set="dyncp",
        handler="sglang_dcp.upstream.step.handlers:get_next_decode_batch",
        why="requests that got their tail page rejoin the batch",
        upstream="a parked state of requests",
        remove_when="SGLang can park requests",
        parameters=("running_batch",),
    ),
    Hook(
        target=f"{_DECODE}._bootstrap_addr",
        kind="around",
        hook_set="dyncp",
        handler=f"{_ROOM}.preallocation:bootstrap_address",
        why="requests of a fake transfer need not name a prefill server",
        upstream="an address for requests that SGLang itself takes for fake ones",
        remove_when="_bootstrap_addr takes a request without bootstrap_host",
        parameters=("req",),
    ),
    Hook(
        target=f"{_DECODE}.prepare_abort",
        kind="around",
        hook_set="dyncp",
        handler=f"{_ROOM}.preallocation:end_without_kv",
        why="a client whose request lost its prefill server is told to ask again",
        upstream="HTTP 503 for a failed transfer",
        remove_when="failed transfers end with 503",
        parameters=("req", "error_message", "status_code"),
    ),
    Hook(
        target=f"{_QUEUE}._check_if_req_exceed_kv_capacity",
        kind="around",
        hook_set="dyncp",
        handler=f"{_ROOM}.preallocation:exceeds_capacity",
        why="a request may be longer than one pool",
        upstream="capacity as an allocator property",
        remove_when="the queue asks the allocator",
        parameters=("req",),
    ),
    Hook(
        target=f"{_QUEUE}._update_handshake_waiters",
        kind="after",
        hook_set="dyncp",
        handler=f"{_ROOM}.preallocation:take_ready",
        why="a sharded request waits for its reservation, and nobody waits behind it",
        upstream=_BUDGET,
        remove_when=_BUDGET_THERE,
        parameters=(),
    ),
    Hook(
        target=f"{_QUEUE}._ensure_prefill_info",
        kind="around",
        hook_set="dyncp",
        handler=f"{_ROOM}.meeting:meet_prefill_servers",
        why="a prefill server that does not fit ends its own requests, not the decode server",
        upstream="a failed check of a prefill server fails the requests that name it",
        remove_when="_ensure_prefill_info does not raise",
        parameters=("addr_to_reqs",),
    ),
    Hook(
        target=f"{_QUEUE}._alloc_for_decode_prealloc",
        kind="around",
        hook_set="dyncp",
        handler=f"{_ROOM}.preallocation:allocate",
        why="reserved pages are used for a sharded request's prompt",
        upstream="allocation by request in the allocator",
        remove_when="the allocator is handed requests",
        parameters=("allocator",),
    ),
    Hook(
        target=f"{_QUEUE}.pop_preallocated",
        kind="around",
        hook_set="dyncp",
        handler=f"{_ROOM}.preallocation:pop_preallocated",
        why="sharded requests begin their transfer beside SGLang's own",
        upstream=_BUDGET,
        remove_when=_BUDGET_THERE,
        parameters=(),
    ),
    Hook(
        target=f"{_QUEUE}._allocatable_token_budgets",
        kind="after",
        hook_set="dyncp",
        handler=f"{_ROOM}.preallocation:leave_withheld",
        why="local requests leave the pages that are promised to a reservation or left to growth",
        upstream=_BUDGET,
        remove_when=_BUDGET_THERE,
        parameters=(),
    ),
    Hook(
        target=f"{_QUEUE}._active_req_count",
        kind="after",
        hook_set="dyncp",
        handler=f"{_ROOM}.preallocation:count_active",
        why="a sharded request's output does not burden the home's pool alone",
        upstream=_BUDGET,
        remove_when=_BUDGET_THERE,
        parameters=(),
    ),
    Hook(
        target=f"{_QUEUE}._need_space_for_single_req",
        kind="around",
        hook_set="dyncp",
        handler=f"{_ROOM}.preallocation:space_for_one",
        why="a request that outgrows its pool goes on elsewhere",
        upstream=_BUDGET,
        remove_when=_BUDGET_THERE,
        parameters=("retractable_tokens",),
    ),
    Hook(
        target=f"{_QUEUE}._required_admission_tokens",
        kind="around",
        hook_set="dyncp",
        handler=f"{_ROOM}.preallocation:required_tokens",
        why="the same; and a request that fits its pool is not asked for more than the pool",
        upstream=_BUDGET,
        remove_when=_BUDGET_THERE,
        parameters=("req", "allocated_tokens", "prefix_len", "retractable_tokens"),
    ),
    Hook(
        target="sglang.srt.disaggregation.decode_schedule_batch_mixin.ScheduleBatchDisaggregationDecodeMixin.prepare_for_prebuilt",
        kind="before",
        hook_set="dyncp",
        handler=f"{_ROOM}.preallocation:begin_behind_prefix",
        why="cached_tokens counts what a request has taken over, where its prefill server found less",
        upstream="a match of the tree that another cache can answer",
        remove_when="the prefix of a transferred request is kept from its preallocation on",
        parameters=(),
    ),
    Hook(
        target=f"{_RECEIVER}._register_kv_args",
        kind="after",
        hook_set="dyncp",
        handler=f"{_ROOM}.announcing:register_all",
        why="a prefill server knows the pools of all instances",
        upstream="several pools per request in the transfer",
        remove_when="a receiver can register pools of other processes",
        parameters=(),
    ),
    Hook(
        target=f"{_RECEIVER}.send_metadata",
        kind="around",
        hook_set="dyncp",
        handler=f"{_ROOM}.announcing:send_metadata",
        why="a sharded request's K/V is written where its pages lie",
        upstream="several pools per request in the transfer",
        remove_when="a receiver takes a page list per pool",
        parameters=("kv_indices", "aux_index", "state_indices", "decode_prefix_len"),
    ),
)

PREFILL_HOOKS: tuple[Hook, ...] = (
    *(
        Hook(
            target=f"{_MOONCAKE}.MooncakeKVManager.{name}",
            kind="around",
            hook_set="pd",
            handler=f"{_ROOM}.sending:send_owned",
            why="a shard is sent its own pages of a request, not all of them",
            upstream="page lists with gaps in the transfer",
            remove_when="pages without a destination are left out",
            parameters=("prefill_kv_indices", "dst_kv_indices"),
        )
        for name in ("send_kvcache", "send_kvcache_slice")
    ),
    Hook(
        target=f"{_MOONCAKE}.MooncakeKVSender.supports_host_tensor_indices",
        kind="register",
        hook_set="pd",
        handler=f"{_ROOM}.sending:read_indices_on_host",
        why="on a CPU page numbers are read without pinned memory and CUDA events",
        upstream="page numbers on the host by device",
        remove_when="a prefill server on a CPU sends",
    ),
)
