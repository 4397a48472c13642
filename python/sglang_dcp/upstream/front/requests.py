"""Requests in the main process: what cannot be served is refused with HTTP 400 before it reaches a scheduler, streaming or not."""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from fastapi import HTTPException
from fastapi.responses import JSONResponse

from sglang_dcp.config import DynCpConfig
from sglang_dcp.upstream.attach.install import verify_installed
from sglang_dcp.upstream.ending.workers import end_on_sigquit
from sglang_dcp.upstream.front.field_kinds import Sizes
from sglang_dcp.upstream.front.request_limits import RequestError, RequestLimits, check_address, check_options
from sglang_dcp.upstream.front.request_ranges import check_body, check_labels, check_prompt
from sglang_dcp.upstream.front.tokenizer_workers import POOL_KEY, PoolTokens
from sglang_dcp.upstream.router.placement_hint import strip_hints


def learn_limits(result: tuple[Any, ...], engine: type, *args: Any, **kwargs: Any) -> None:
    """AFTER Engine._launch_subprocesses: the schedulers have told how large their pools are."""
    from sglang.srt.managers.tokenizer_manager import TokenizerManager

    verify_installed()
    manager, init = result[0], result[3]
    if manager is None:
        return
    pool_tokens = min(int(info["max_total_num_tokens"]) for info in init.scheduler_infos)
    init.scheduler_infos[0][POOL_KEY] = PoolTokens(pool_tokens)
    if isinstance(manager, TokenizerManager):
        manager.dyncp_limits = limits_of(pool_tokens)
    else:
        end_on_sigquit(result[4])


def learn_worker_limits(result: None, global_state: Any) -> None:
    """AFTER http_server.set_global_state. In the main process of a server with workers there is no tokenizer manager, but their router."""
    from sglang.srt.managers.tokenizer_manager import TokenizerManager

    manager = global_state.tokenizer_manager
    if isinstance(manager, TokenizerManager):
        manager.dyncp_limits = limits_of(global_state.scheduler_info[POOL_KEY])


def learn_engine_limits(result: tuple[Any, Any], server_args: Any, port_args: Any, scheduler_info: Mapping[str, Any]) -> None:
    """AFTER Engine._init_tokenizer_worker: an Engine with workers has one in its own process, and others join it."""
    verify_installed()
    result[0].dyncp_limits = limits_of(scheduler_info[POOL_KEY])


def limits_of(pool_tokens: int) -> RequestLimits:
    """pool_tokens: of the smallest pool. The rest is every process's own."""
    from sglang.srt.runtime_context import get_parallel, get_schedule

    config = DynCpConfig.from_environment()
    if config is None:
        raise RuntimeError("the dyncp hooks are installed but no configuration came with the environment")
    num_instances = int(get_parallel().num_dp_ranks)
    return RequestLimits(config.resolve(num_instances), num_instances, pool_tokens, page_size=int(get_schedule().page_size))


def check_request_options(manager: Any, obj: Any, request: Any = None) -> None:
    """BEFORE TokenizerManager.generate_request."""
    from sglang.srt.environ import envs
    from sglang.srt.managers.io_struct import EmbeddingReqInput
    from sglang.srt.runtime_context import get_disagg, get_observability

    if isinstance(obj, EmbeddingReqInput):
        raise RequestError("embedding, classification and reranking requests do not work with --enable-dyncp: such models do not decode")
    check_options(obj)
    disaggregation = get_disagg()
    check_address(obj, disaggregation.disaggregation_mode, disaggregation.disaggregation_transfer_backend)
    check_body(obj, Sizes(int(manager.model_config.vocab_size), typed=not envs.SGLANG_USE_PICKLE_IPC.get()))
    if manager.enable_metrics:
        check_labels(obj.custom_labels, get_observability().tokenizer_metrics_allowed_custom_labels or ())


def validate_request(original: Callable[..., None], manager: Any, obj: Any, input_ids: list[int] | None) -> None:
    """AROUND TokenizerManager._validate_one_request: ranges, pins and length. A client's own placement hint ends here."""
    check_prompt(obj, input_ids, int(manager.model_config.vocab_size))
    original(manager, obj, input_ids)
    obj.kv_hints = strip_hints(obj.kv_hints)
    limits: RequestLimits = manager.dyncp_limits
    if manager.allow_auto_truncate and input_ids:
        obj.sampling_params = limits.truncate(input_ids, obj.sampling_params)
    # SGLang fills in --preferred-sampling-params behind this check, and the router reads the pin. Of a length there it serves what fits.
    preferred = {"custom_params": (manager.preferred_sampling_params or {}).get("custom_params")}
    placement = limits.check(len(input_ids or ()), preferred | (obj.sampling_params or {}), obj.routed_dp_rank)
    obj.dyncp_is_sharded = not placement.is_local


async def send_request(original: Callable[..., Any], manager: Any, tokenized: Any) -> Any:
    """AROUND TokenizerManager._send_one_request. Before the samples of a request with n > 1, SGLang runs its prompt once without output,
    to fill the prefix cache. A sharded prompt never enters the cache, so that run is answered here instead of computed.
    """
    state = manager.rid_to_state.get(tokenized.rid)
    if state is None or not _only_fills_the_cache(state.obj, tokenized) or not getattr(state.obj, "dyncp_is_sharded", False):
        return await original(manager, tokenized)
    state.out_list.append({"text": "", "output_ids": [], "meta_info": {"id": tokenized.rid, "finish_reason": None}})
    state.finished = True
    state.event.set()
    # SGLang looks the state up once more, before anything else runs; then it is over, as after a scheduler's last output.
    asyncio.get_running_loop().call_soon(manager.rid_to_state.pop, tokenized.rid, None)
    return None


def _only_fills_the_cache(obj: Any, tokenized: Any) -> bool:
    """Whether SGLang set the output length to 0, and not the client."""
    asked = getattr(obj, "sampling_params", None) or {}
    return asked.get("n", 1) > 1 and tokenized.sampling_params.max_new_tokens == 0 and asked.get("max_new_tokens") != 0


async def serve_generate(original: Callable[..., Any], obj: Any, request: Any) -> Any:
    """AROUND http_server.serve_generate_request: a stream that starts with an error becomes a plain error answer.

    The OpenAI endpoints do the same upstream: they wait for the first chunk before they send status 200.
    """
    response = await original(obj, request)
    if not obj.stream:
        return response
    chunks = response.body_iterator
    first = await anext(chunks, None)
    error = _read_error(first)
    if error is not None:
        await chunks.aclose()
        return JSONResponse({"error": error}, status_code=int(error.get("code") or 400), background=response.background)
    response.body_iterator = _prepend(first, chunks)
    return response


def _read_error(chunk: Any) -> dict[str, Any] | None:
    """{"message", "code"} of a first chunk that is an error: an error event, or a request that ended with a status (a full queue)."""
    if not isinstance(chunk, bytes) or not (chunk.startswith(b'data: {"error"') or b'"status_code"' in chunk):
        return None
    event = json.loads(chunk.removeprefix(b"data: "))
    if "error" in event:
        return dict(event["error"])
    reason = event.get("meta_info", {}).get("finish_reason") or {}
    if reason.get("type") == "abort" and reason.get("status_code"):
        return {"message": reason["message"], "code": int(reason["status_code"])}
    return None


async def _prepend(first: Any, rest: AsyncIterator[Any]) -> AsyncIterator[Any]:
    if first is not None:
        yield first
    async for chunk in rest:
        yield chunk


class ControlRefused(HTTPException):
    """HTTP 400 from any endpoint: some print an exception's text, others leave it to FastAPI."""

    def __init__(self, call: str, reason: str = "it would change weights or pools under requests that live on several instances") -> None:
        super().__init__(status_code=400, detail=f"{call} does not work with --enable-dyncp: {reason}")

    def __str__(self) -> str:
        return self.detail


def refuse_control(original: Callable[..., Any]) -> Callable[..., Any]:
    """In place of control calls that would touch pages of every instance: weight updates, memory release, sessions, adapters."""

    @functools.wraps(original)
    async def refused(manager: Any, *args: Any, **kwargs: Any) -> None:
        raise ControlRefused(original.__name__)

    return refused


async def pause_generation(original: Callable[..., Any], manager: Any, obj: Any) -> None:
    """AROUND pause_generation of TokenizerManager and TokenizerWorker.

    in_place: schedulers take control requests from one broadcast over all of them, so all pause between the same two steps and none waits
    for another in an exchange. abort: the main process aborts every request and holds new ones back, until all instances have answered
    behind that: a step takes new requests before control requests, so one that is sent after /continue_generation could still be aborted.
    retract would free the home's share of a sharded request and none of its guests' pages.
    """
    if obj.mode == "retract":
        raise ControlRefused('pause_generation with mode "retract"', "sharded requests cannot be taken off all instances at once")
    await original(manager, obj)
    if obj.mode == "abort":
        await manager.get_internal_state()


async def record_experts(original: Callable[..., Any], manager: Any) -> None:
    """AROUND the calls that record which experts are chosen: without a recorder every scheduler would raise, and the server end."""
    from sglang.srt.runtime_context import get_exec

    if get_exec().moe.expert_distribution_recorder_mode is None:
        raise HTTPException(status_code=400, detail=f"{original.__name__} needs a server with --expert-distribution-recorder-mode")
    await original(manager)
