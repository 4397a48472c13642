"""SGLang settings that dynamic context parallelism needs, completes or refuses. Nothing is changed silently."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sglang_dcp.config import ConfigError, DynCpConfig
from sglang_dcp.upstream.attach.cuda_settings import (
    QUANTISED_KV,
    complete_attention_backend,
    complete_prefill_graph,
    find_card_refusal,
    find_cuda_refusal,
    find_quantised_kv_refusal,
    find_transport_refusal,
    find_untried,
)
from sglang_dcp.upstream.attach.disaggregation_settings import complete_decode, find_decode_refusal
from sglang_dcp.upstream.attach.model_sizes import learn_served_model
from sglang_dcp.upstream.attach.widths import SettingError, complete_widths, find_slices_refusal
from sglang_dcp.upstream.front.tokenizer_workers import find_app_refusal

logger = logging.getLogger(__name__)

SOURCE = "dyncp"
PAGE_SIZES = {"cpu": 16, "cuda": 64}
"""Tokens per page where the user names none, by device: SGLang would take 1, and the ledger needs whole pages."""


@dataclass(frozen=True)
class Refusal:
    """A setting that cannot work together with --enable-dyncp. `works` judges the resolved value of `field`."""

    field: str
    flag: str
    works: Callable[[Any], bool]
    reason: str


def _off(value: Any) -> bool:
    return not value


PAST_THE_CHECKS = "its requests reach the schedulers without the checks of the main process"

REFUSALS: tuple[Refusal, ...] = (
    Refusal("device", "--device", lambda v: v in ("cpu", "cuda"), "there is no data path for this device"),
    Refusal("pp_size", "--pp-size", lambda v: v == 1, "a request's shards are found by data-parallel rank alone"),
    Refusal("speculative_algorithm", "--speculative-algorithm", _off, "step plans assume one new token per request and step"),
    Refusal("disaggregation_mode", "--disaggregation-mode", lambda v: v in (None, "null", "decode"), "prefill servers run without it"),
    Refusal("enable_hierarchical_cache", "--enable-hierarchical-cache", _off, "host copies of remote pages do not exist"),
    Refusal("enable_lora", "--enable-lora", _off, "not tested with sharded requests"),
    Refusal("lora_paths", "--lora-paths", _off, "not tested with sharded requests"),
    Refusal("enable_two_batch_overlap", "--enable-two-batch-overlap", _off, "it splits a step's rows in two"),
    Refusal(
        "enable_single_batch_overlap",
        "--enable-single-batch-overlap",
        _off,
        "SGLang runs it on no Hopper GPU, and sharded steps were run on no other",
    ),
    Refusal("enable_mixed_chunk", "--enable-mixed-chunk", _off, "a batch is either a prefill or a decode"),
    Refusal("enable_pdmux", "--enable-pdmux", _off, "a batch is either a prefill or a decode"),
    Refusal("page_size", "--page-size", lambda v: v is not None and v > 1, "the ledger works in pages of at least 2 tokens"),
    Refusal(
        "kv_cache_dtype",
        "--kv-cache-dtype",
        lambda v: v in ("auto", "bf16", "bfloat16", "float16", "float32", QUANTISED_KV),
        f"of quantised K/V {QUANTISED_KV} alone is exchanged",
    ),
    Refusal("enable_hisparse", "--enable-hisparse", _off, "it keeps KV of running requests on the host"),
    Refusal("dllm_algorithm", "--dllm-algorithm", _off, "diffusion decoding rewrites tokens"),
    Refusal("dcp_size", "--dcp-size", lambda v: v == 1, "static and dynamic context parallelism exclude each other"),
    Refusal("moe_dp_size", "--moe-dp-size", lambda v: v == 1, "experts are spread over all instances"),
    Refusal("attn_cp_size", "--attn-cp-size", lambda v: v == 1, "static and dynamic context parallelism exclude each other"),
    Refusal("elastic_ep_backend", "--elastic-ep-backend", _off, "the number of instances is fixed"),
    Refusal("is_embedding", "--is-embedding", _off, "embedding models do not decode"),
    Refusal("smg_grpc_mode", "--smg-grpc-mode", _off, PAST_THE_CHECKS),
    Refusal("enable_memory_saver", "--enable-memory-saver", _off, "released pools would take guests' pages with them"),
    Refusal("enable_streaming_session", "--enable-streaming-session", _off, "a session keeps KV rows that the ledger does not know"),
    Refusal("enable_priority_scheduling", "--enable-priority-scheduling", _off, "preemption would free pages that reservations count on"),
    Refusal("dwdp_size", "--dwdp-size", lambda v: v <= 1, "not tested with sharded requests"),
    # Behind the settings that turn it on themselves (DWDP, elastic EP): theirs is the flag that the user gave.
    Refusal(
        "enable_dp_attention_local_control_broadcast",
        "--enable-dp-attention-local-control-broadcast",
        _off,
        "an instance that pauses a step before the others would leave them waiting in the step's exchange",
    ),
)


def find_refusal(values: Callable[[str], Any], *, resolved: bool = True) -> str | None:
    """The message for the first setting that cannot work, or None. `values(field)` reads a setting.

    resolved: False before SGLang's resolution, where None says that SGLang has yet to decide it.
    """
    for refusal in REFUSALS:
        value = values(refusal.field)
        if value is None and not resolved:
            continue
        if not refusal.works(value):
            return f"{refusal.flag} {value} does not work with --enable-dyncp: {refusal.reason}"
    return None


def find_layout_refusal(config: DynCpConfig, num_instances: int) -> str | None:
    """The message for flags of ours that this number of instances, or their nodes, cannot keep, or None."""
    try:
        config.resolve(num_instances)
    except ConfigError as error:
        return str(error)
    return None


def find_rebalance_refusal(values: Callable[[str], Any]) -> str | None:
    """The message for a CPU server whose first rebalance of experts would end it, or None. `values(field)`: as resolved."""
    if values("device") != "cpu" or not values("enable_eplb") or values("eplb_rebalance_layers_per_chunk") is not None:
        return None
    return (
        "--enable-eplb True does not work with --enable-dyncp on --device cpu without --eplb-rebalance-layers-per-chunk: SGLang times a "
        "rebalance of all layers at once with CUDA"
    )


def find_front_refusal(rust_server: bool, workers: int = 1, worker_app: str | None = None) -> str | None:
    """The message for a server that an environment variable chooses and that checks no requests, or None: SGLang's inside a scheduler, or
    an application of the user's for several tokenizer workers."""
    if rust_server:
        return f"SGLANG_RUST_SERVER=1 does not work with --enable-dyncp: {PAST_THE_CHECKS}"
    return find_app_refusal(workers, worker_app, PAST_THE_CHECKS)


def read_front_refusal(view: Any) -> str | None:
    """find_front_refusal of this process's environment."""
    from sglang.srt.environ import envs

    return find_front_refusal(envs.SGLANG_RUST_SERVER.get(), view.tokenizer_worker_num, envs.SGLANG_HTTP_SERVER_APP_PATH.get())


def read_decode_refusal(server_args: Any, view: Any) -> str | None:
    """find_decode_refusal of this server."""
    from sglang.srt.environ import envs

    fraction, staging = server_args._dyncp.cache_fraction, bool(envs.SGLANG_DISAGG_STAGING_BUFFER.get())
    return find_decode_refusal(lambda field: getattr(view, field), fraction, staging=staging)


def complete_page_size(values: Callable[[str], Any]) -> dict[str, int]:
    """A page size where neither the user nor the attention backend (flashmla: 64) gave one. Other devices are refused later."""
    device = values("device")
    if values("page_size") is not None or device not in PAGE_SIZES:
        return {}
    logger.info("dyncp: --page-size %d (the ledger works in pages of at least 2 tokens)", PAGE_SIZES[device])
    return {"page_size": PAGE_SIZES[device]}


def register_resolution() -> None:
    """Registers with SGLang's resolution pipeline: widths before its first step reads them, refusals there and at its end.

    At its beginning, because later steps of SGLang's would end with errors of their own; at its end, because they also decide settings.
    """
    from sglang.srt.arg_groups.overrides import declare_resolution, resolving_view
    from sglang.srt.arg_groups.resolution_hooks import register_resolution_hook

    @register_resolution_hook("handle_deprecated_dp_attention")
    def instances(server_args: Any, previous: Callable[[Any], None]) -> None:
        previous(server_args)
        view = resolving_view(server_args)
        try:
            widths = complete_widths(view.tp_size, view.attn_dp_size, view.ep_size, view.dp_size, server_args._dyncp_given_widths)
            declare_resolution(server_args, SOURCE, **widths, **complete_decode(lambda field: getattr(view, field)))
        except SettingError as error:
            raise SystemExit(f"sglang_dcp: {error}") from error
        message = read_front_refusal(view)
        message = message or find_refusal(lambda field: getattr(view, field), resolved=False)
        message = message or read_decode_refusal(server_args, view)
        if message is not None:
            raise SystemExit(f"sglang_dcp: {message}")

    @register_resolution_hook("handle_load_balance_method")
    def load_reports(server_args: Any, previous: Callable[[Any], None]) -> None:
        # The router reads load snapshots of every node only under a load-based method (our placement replaces the method itself).
        declare_resolution(server_args, SOURCE, load_balance_method="total_tokens")
        previous(server_args)

    @register_resolution_hook("handle_other_validations")
    def refusals(server_args: Any, previous: Callable[[Any], None]) -> None:
        previous(server_args)
        view = resolving_view(server_args)
        judge_resolved(server_args, view)
        learn_served_model(server_args, view.device)

    _register_cuda_completions()


def judge_resolved(server_args: Any, view: Any) -> None:
    """The refusals that need what SGLang has decided, as SystemExit; what was not run is logged. view: of the resolved settings."""
    from sglang.srt.arg_groups.model_override_base import use_mla_backend
    from sglang.srt.utils import get_device_sm

    config = server_args._dyncp

    def values(field: str) -> Any:
        return getattr(view, field)

    message = read_front_refusal(view) or find_refusal(values) or read_decode_refusal(server_args, view)
    message = message or find_slices_refusal(values) or find_layout_refusal(config, view.attn_dp_size) or find_rebalance_refusal(values)
    message = message or find_transport_refusal(config.transport, view.device) or find_quantised_kv_refusal(values)
    if message is None and view.device == "cuda":
        message = find_card_refusal(get_device_sm()) or find_cuda_refusal(values, latent=use_mla_backend(server_args))
    if message is not None:
        raise SystemExit(f"sglang_dcp: {message}")
    if view.device == "cuda" and (untried := find_untried(values)) is not None:
        logger.warning("dyncp: %s", untried)


def _register_cuda_completions() -> None:
    """What a GPU server needs and the user did not say, each where SGLang's pipeline decides it."""
    from sglang.srt.arg_groups.model_override_base import use_mla_backend
    from sglang.srt.arg_groups.overrides import declare_resolution, resolving_view
    from sglang.srt.arg_groups.resolution_hooks import register_resolution_hook

    def complete(server_args: Any, completion: Callable[[Callable[[str], Any]], dict[str, Any]]) -> None:
        view = resolving_view(server_args)
        if view.device == "cuda" and (fields := completion(lambda field: getattr(view, field))):
            declare_resolution(server_args, SOURCE, **fields)

    @register_resolution_hook("handle_cuda_graph_config")
    def graphs(server_args: Any, previous: Callable[[Any], None]) -> None:
        complete(server_args, complete_prefill_graph)
        previous(server_args)

    @register_resolution_hook("handle_attention_backend_compatibility")
    def backend(server_args: Any, previous: Callable[[Any], None]) -> None:
        complete(server_args, lambda values: complete_attention_backend(values, latent=use_mla_backend(server_args)))
        previous(server_args)
        # Behind the backend, which may decide it, and before SGLang resolves an unset page size to 1.
        view = resolving_view(server_args)
        if fields := complete_page_size(lambda field: getattr(view, field)):
            declare_resolution(server_args, SOURCE, **fields)
