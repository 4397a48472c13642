"""Touch points of processes that serve HTTP: the main process, or each tokenizer worker. No other process imports these modules."""

from __future__ import annotations

from sglang_dcp.upstream.attach.hook import Hook

_MANAGER = "sglang.srt.managers.tokenizer_manager.TokenizerManager"
_WORKER = "sglang.srt.managers.multi_tokenizer_mixin.TokenizerWorker"
_CONTROLS = "sglang.srt.managers.tokenizer_control_mixin.TokenizerControlMixin"
_HTTP = "sglang.srt.entrypoints.http_server"

REFUSED_CONTROLS = (
    f"{_MANAGER}.update_weights_from_disk",
    f"{_CONTROLS}.init_weights_update_group",
    f"{_CONTROLS}.begin_weight_update",
    f"{_CONTROLS}.end_weight_update",
    f"{_CONTROLS}.update_weights_from_distributed",
    f"{_CONTROLS}.update_weights_from_tensor",
    f"{_CONTROLS}.update_weights_from_ipc",
    f"{_CONTROLS}.release_memory_occupation",
    f"{_CONTROLS}.resume_memory_occupation",
    f"{_CONTROLS}.load_lora_adapter",
    f"{_CONTROLS}.load_lora_adapter_from_tensors",
    f"{_CONTROLS}.attach_hicache_storage",
    f"{_CONTROLS}.open_session",
)

_REFUSALS = tuple(
    Hook(
        target=target,
        kind="refuse",
        hook_set="dyncp",
        handler="sglang_dcp.upstream.front.requests:refuse_control",
        why="a control call that does not work with sharded requests is refused by name",
        upstream="a switch per control endpoint",
        remove_when="the call is tested with sharded requests",
    )
    for target in REFUSED_CONTROLS
)

_PAUSES = tuple(
    Hook(
        target=f"{owner}.pause_generation",
        kind="around",
        hook_set="dyncp",
        handler="sglang_dcp.upstream.front.requests:pause_generation",
        why="mode retract is refused by name; in_place and abort are SGLang's own",
        upstream="a switch per control endpoint",
        remove_when="a retraction of all requests at once frees sharded ones on every instance",
        parameters=("obj",),
    )
    for owner in (_MANAGER, _WORKER)
)

_RECORDERS = tuple(
    Hook(
        target=f"{_CONTROLS}.{action}_expert_distribution_record",
        kind="around",
        hook_set="dyncp",
        handler="sglang_dcp.upstream.front.requests:record_experts",
        why="without a recorder the call is HTTP 400; in the schedulers it would raise, and end all of them",
        upstream="an answer instead of an exception where no recorder is configured",
        remove_when="the recorder that does nothing does not raise",
        parameters=(),
    )
    for action in ("start", "stop", "dump")
)

DYNCP_MAIN_HOOKS: tuple[Hook, ...] = (
    Hook(
        target="sglang.srt.entrypoints.engine.Engine._launch_subprocesses",
        kind="after",
        hook_set="dyncp",
        handler="sglang_dcp.upstream.front.requests:learn_limits",
        why="the main process knows how long a request may be",
        upstream="pool sizes on the tokenizer manager",
        remove_when="the tokenizer manager has max_total_num_tokens",
        parameters=(),
    ),
    Hook(
        target=f"{_HTTP}.set_global_state",
        kind="after",
        hook_set="dyncp",
        handler="sglang_dcp.upstream.front.requests:learn_worker_limits",
        why="so does every tokenizer worker",
        upstream="pool sizes on the tokenizer manager",
        remove_when="the tokenizer manager has max_total_num_tokens",
        parameters=("global_state",),
    ),
    Hook(
        target="sglang.srt.entrypoints.engine.Engine._init_tokenizer_worker",
        kind="after",
        hook_set="dyncp",
        handler="sglang_dcp.upstream.front.requests:learn_engine_limits",
        why="so does a worker of an Engine, in whichever process it was attached",
        upstream="pool sizes on the tokenizer manager",
        remove_when="the tokenizer manager has max_total_num_tokens",
        parameters=("scheduler_info",),
    ),
    Hook(
        target=f"{_MANAGER}.generate_request",
        kind="before",
        hook_set="dyncp",
        handler="sglang_dcp.upstream.front.requests:check_request_options",
        why="options that are not served are refused by name",
        upstream="a validation seam for requests",
        remove_when="SGLang registers request validators",
        parameters=("obj", "request"),
    ),
    Hook(
        target=f"{_MANAGER}._validate_one_request",
        kind="around",
        hook_set="dyncp",
        handler="sglang_dcp.upstream.front.requests:validate_request",
        why="values out of range, pins and lengths that no placement can honour are HTTP 400",
        upstream="a validation seam for requests",
        remove_when="SGLang registers request validators",
        parameters=("obj", "input_ids"),
    ),
    Hook(
        target=f"{_MANAGER}._send_one_request",
        kind="around",
        hook_set="dyncp",
        handler="sglang_dcp.upstream.front.requests:send_request",
        why="a sharded prompt of n > 1 samples is not computed once more for a cache that it never enters",
        upstream="no warm-up run for requests that skip the prefix cache",
        remove_when="_handle_batch_request asks whether the prompt can be cached",
        parameters=("tokenized_obj",),
    ),
    Hook(
        target=f"{_HTTP}.serve_generate_request",
        kind="around",
        hook_set="dyncp",
        handler="sglang_dcp.upstream.front.requests:serve_generate",
        why="a refused stream is HTTP 400, not 200 with an error inside",
        upstream="validation before the stream starts, as in the OpenAI endpoints",
        remove_when="/generate validates a stream before it answers 200",
        parameters=("obj", "request"),
    ),
    Hook(
        target=f"{_MANAGER}.update_request_meta_info",
        kind="around",
        hook_set="dyncp",
        handler="sglang_dcp.upstream.front.result:add_meta_info",
        why="meta_info.dyncp is one object, not a list over tokens",
        upstream="request-level values in customized_info",
        remove_when="update_request_meta_info keeps a dict as it is",
        parameters=("meta_info", "state", "customized_info", "index", "finish_reason"),
    ),
    Hook(
        target=f"{_HTTP}.app.add_api_route",
        kind="register",
        hook_set="dyncp",
        handler="sglang_dcp.upstream.front.result:add_report_route",
        why="`sglang-dcp requests` and `top` read where requests live",
        upstream="nothing: this is FastAPI's own registry",
        remove_when="never",
        parameters=("path", "endpoint"),
    ),
    Hook(
        target=f"{_HTTP}.app.add_api_route",
        kind="register",
        hook_set="dyncp",
        handler="sglang_dcp.upstream.front.live:add_live_routes",
        why="the live page, and the load that it and `top` read",
        upstream="nothing: this is FastAPI's own registry",
        remove_when="never",
        parameters=("path", "endpoint"),
    ),
    Hook(
        target="sglang.srt.utils.auth.decide_request_auth",
        kind="around",
        hook_set="dyncp",
        handler="sglang_dcp.upstream.front.live:open_page",
        why="a browser gets the live page, which holds no data, before it can send a key",
        upstream="an auth level for endpoints that are open",
        remove_when="AuthLevel has such a level",
        parameters=("method", "path"),
    ),
    *_PAUSES,
    *_RECORDERS,
    Hook(
        target=f"{_HTTP}.app.add_middleware",
        kind="register",
        hook_set="dyncp",
        handler="sglang_dcp.upstream.ending.gate:add_gate",
        why="a server that is ending answers HTTP 503, and knows which answers are still open",
        upstream="nothing: this is FastAPI's own registry",
        remove_when="SGLang answers open requests before it ends",
        parameters=("middleware_class",),
    ),
    Hook(
        target=f"{_MANAGER}.auto_create_handle_loop",
        kind="before",
        hook_set="dyncp",
        handler="sglang_dcp.upstream.ending.handler:take_signals",
        why="on the loss of an instance every open request gets HTTP 503, and the exit code is 75",
        upstream="answers before the end in running_phase_sigquit_handler, and a bounded drain in sigterm_watchdog",
        remove_when="SGLang answers open requests before it ends",
        parameters=(),
    ),
    Hook(
        target=f"{_MANAGER}.handle_loop",
        kind="around",
        hook_set="dyncp",
        handler="sglang_dcp.upstream.ending.handler:end_on_failure",
        why="an exception of the main process ends the server as the loss of an instance does: every open request gets HTTP 503",
        upstream="answers before the end in print_exception_wrapper",
        remove_when="SGLang answers open requests before it ends",
        parameters=(),
    ),
    *_REFUSALS,
)
