"""SGLang settings that dynamic context parallelism needs, completes or refuses. Nothing is changed silently."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from sglang_dcp.config import ConfigError, DynCpConfig
from sglang_dcp.upstream.attach.cuda_settings import (
    BACKEND_FIELDS,
    PLAIN_BACKEND,
    complete_attention_backend,
    complete_prefill_graph,
    find_card_refusal,
    find_cuda_refusal,
    find_quantised_kv_refusal,
    find_transport_refusal,
    find_untried,
)
from sglang_dcp.upstream.attach.disaggregation_settings import complete_decode, find_decode_refusal, find_window_refusal
from sglang_dcp.upstream.attach.model_sizes import learn_served_model
from sglang_dcp.upstream.attach.models import WINDOW_MODELS
from sglang_dcp.upstream.attach.page_sizes import complete_chunk_size, complete_page_size, find_chunk_refusal
from sglang_dcp.upstream.attach.refusals import PAST_THE_CHECKS, find_refusal
from sglang_dcp.upstream.attach.widths import SettingError, complete_widths, find_slices_refusal
from sglang_dcp.upstream.front.tokenizer_workers import find_app_refusal

logger = logging.getLogger(__name__)

SOURCE = "dyncp"
LOADS_READ = "total_tokens"
"""A --load-balance-method under which SGLang's router reads the loads of all nodes."""


def find_layout_refusal(config: DynCpConfig, num_instances: int) -> str | None:
    """The message for flags of ours that this number of instances, or their nodes, cannot keep, or None."""
    try:
        config.resolve(num_instances)
    except ConfigError as error:
        return str(error)
    return None


def find_cache_refusal(values: Callable[[str], Any], cache_fraction: float) -> str | None:
    """The message for retained prompts that nobody may read, or None. `values(field)`: of a decode server as given, for SGLang sets that
    flag there by itself."""
    if not cache_fraction or not values("disable_radix_cache"):
        return None
    return f"--dyncp-cache-fraction {cache_fraction} does not work with --disable-radix-cache: what shall not be reused is not retained"


def find_rebalance_refusal(values: Callable[[str], Any]) -> str | None:
    """The message for a CPU server whose first rebalance of experts would end it, or None. `values(field)`: as resolved."""
    if values("device") != "cpu" or not values("enable_eplb") or values("eplb_rebalance_layers_per_chunk") is not None:
        return None
    return (
        "--enable-eplb True does not work with --enable-dyncp on --device cpu without --eplb-rebalance-layers-per-chunk: SGLang times a "
        "rebalance of all layers at once with CUDA"
    )


def find_cpu_backend_refusal(values: Callable[[str], Any]) -> str | None:
    """The message for a CPU server whose sharded steps would run a backend of SGLang's as it is, or None. `values(field)`: as resolved. On
    a CPU with AMX, and a package of kernels for it, SGLang's own choice is such a one."""
    if values("device") != "cpu":
        return None
    for field in BACKEND_FIELDS:
        if values(field) not in (None, PLAIN_BACKEND):
            return (
                f"--{field.replace('_', '-')} {values(field)} does not work with --enable-dyncp on --device cpu: sharded steps need "
                f"{PLAIN_BACKEND} (--attention-backend {PLAIN_BACKEND})"
            )
    return None


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


def read_decode_refusal(view: Any) -> str | None:
    """find_decode_refusal of this server."""
    from sglang.srt.environ import envs

    return find_decode_refusal(lambda field: getattr(view, field), staging=bool(envs.SGLANG_DISAGG_STAGING_BUFFER.get()))


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
        with _refusing():
            widths = complete_widths(view.tp_size, view.attn_dp_size, view.ep_size, view.dp_size, server_args._dyncp_given_widths)
            declare_resolution(server_args, SOURCE, **widths, **complete_decode(lambda field: getattr(view, field)))
        message = read_front_refusal(view)
        message = message or find_refusal(lambda field: getattr(view, field), resolved=False)
        message = message or read_decode_refusal(view)
        message = message or find_cache_refusal(lambda field: getattr(view, field), server_args._dyncp.cache_fraction)
        if message is not None:
            raise SystemExit(f"sglang_dcp: {message}")

    @register_resolution_hook("handle_load_balance_method")
    def load_reports(server_args: Any, previous: Callable[[Any], None]) -> None:
        # The router reads load snapshots of every node only under a load-based method (our placement replaces the method itself).
        if (given := resolving_view(server_args).load_balance_method) not in (None, "auto", LOADS_READ):
            unused = "requests are placed by --dyncp-policy, under local by the tokens of an instance"
            logger.warning("dyncp: --load-balance-method %s is not used: %s", given, unused)
        declare_resolution(server_args, SOURCE, load_balance_method=LOADS_READ)
        previous(server_args)

    @register_resolution_hook("handle_other_validations")
    def refusals(server_args: Any, previous: Callable[[Any], None]) -> None:
        previous(server_args)
        view = resolving_view(server_args)
        judge_resolved(server_args, view)
        with _refusing():
            learn_served_model(server_args, view.device)

    _register_one_pool()
    _register_chunks()
    _register_cuda_completions()


@contextmanager
def _refusing() -> Iterator[None]:
    """A setting that cannot work ends the start with our message."""
    try:
        yield
    except (SettingError, ConfigError) as error:
        raise SystemExit(f"sglang_dcp: {error}") from error


def _register_one_pool() -> None:
    """Models with window layers keep all K/V in pages of one kind, which every instance can hold for every other."""
    from sglang.srt.arg_groups.model_override_base import register_model_override
    from sglang.srt.arg_groups.overrides import resolving_view

    def one_pool(server_args: Any, hf_config: Any) -> dict[str, bool]:
        view = resolving_view(server_args)
        if (message := find_window_refusal(view.disaggregation_mode, hf_config.architectures[0])) is not None:
            raise SystemExit(f"sglang_dcp: {message}")
        if view.disable_hybrid_swa_memory:
            return {}
        logger.warning(
            "dyncp: --disable-hybrid-swa-memory True (window layers keep the K/V of whole sequences; with a pool of their own a page "
            "would not say where its tokens lie)"
        )
        return {"disable_hybrid_swa_memory": True}

    for architecture in WINDOW_MODELS:
        register_model_override(architecture)(one_pool)


def _register_chunks() -> None:
    """Chunks of whole pages, where SGLang divides them by the number of instances."""
    from sglang.srt.arg_groups.overrides import declare_resolution, resolving_view
    from sglang.srt.arg_groups.resolution_hooks import register_resolution_hook

    @register_resolution_hook("handle_data_parallelism")
    def chunks(server_args: Any, previous: Callable[[Any], None]) -> None:
        view = resolving_view(server_args)
        given = view.chunked_prefill_size
        previous(server_args)
        with _refusing():
            fields = complete_chunk_size(given, lambda field: getattr(view, field))
        if fields:
            declare_resolution(server_args, SOURCE, **fields)


def judge_resolved(server_args: Any, view: Any) -> None:
    """The refusals that need what SGLang has decided, as SystemExit; what was not run is logged. view: of the resolved settings."""
    from sglang.srt.arg_groups.model_override_base import use_mla_backend
    from sglang.srt.utils import get_device_sm

    config = server_args._dyncp

    def values(field: str) -> Any:
        return getattr(view, field)

    message = read_front_refusal(view) or find_refusal(values) or read_decode_refusal(view)
    message = message or find_layout_refusal(config, view.attn_dp_size) or find_rebalance_refusal(values)
    message = message or find_cpu_backend_refusal(values)
    message = message or find_chunk_refusal(values, sharded=config.policy != "local")
    if view.disaggregation_mode != "decode":
        message = message or find_cache_refusal(values, config.cache_fraction)
    latent = use_mla_backend(server_args)
    message = message or find_transport_refusal(config.transport, view.device) or find_quantised_kv_refusal(values, latent=latent)
    if message is None and view.device == "cuda":
        message = find_card_refusal(get_device_sm()) or find_cuda_refusal(values, latent=latent, transport=config.transport)
    message = message or find_slices_refusal(values, config)
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
