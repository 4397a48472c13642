"""Settings of a GPU server: what is completed and what is refused."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)

BACKEND = "flashinfer"
PLAIN_BACKEND = "torch_native"
"""Serves GQA of any element type, slowly and without graphs: what float32 is compared with."""
DEFAULT_BACKEND = "fa3"
"""SGLang's own default on a Hopper GPU. It runs the steps in which nobody is sharded; the others run FlashInfer's kernels, over the same
pool."""
LATENT_BACKEND = "flashmla"
BACKENDS = (BACKEND, DEFAULT_BACKEND, LATENT_BACKEND, PLAIN_BACKEND)
BACKEND_FIELDS = ("attention_backend", "prefill_attention_backend", "decode_attention_backend")
EXPERT_BACKENDS = ("none", "deepep")
"""Expert all-to-all backends that take an instance's own rows and no others: ours changes attention, and rows stay at their home for it."""
HOPPER_SM = 90
QUANTISED_KV, QUANTISED_KV_TYPE = "fp8_e4m3", "float8_e4m3fn"
"""The one quantised K/V that is exchanged: SGLang's name of the setting, torch's of the type."""
QUANTISED_BACKENDS = {False: (DEFAULT_BACKEND, BACKEND), True: (LATENT_BACKEND,)}
"""What runs over such pools, by whether attention is latent (MLA): there SGLang's FlashInfer casts a whole pool in every layer and step."""
CUDA_TRANSPORTS = ("auto", "peer", "nccl", "gloo")
CPU_TRANSPORTS = ("auto", "gloo")


def is_quantised(kv_cache_dtype: Any) -> bool:
    """Whether a pool of torch's type is of the one that is exchanged."""
    return str(kv_cache_dtype).removeprefix("torch.") == QUANTISED_KV_TYPE


def has_slices(values: Callable[[str], Any]) -> bool:
    """Whether an instance is several processes (attention TP), by the resolved widths."""
    return bool(values("tp_size") != values("attn_dp_size"))


def complete_attention_backend(values: Callable[[str], Any], *, latent: bool) -> dict[str, str]:
    """FlashInfer (FlashMLA over quantised latents) where the user named no backend and SGLang's own default was not run beside sharded
    steps: MLA, and instances of several slices. Else the default stands, and steps in which nobody is sharded run what they would run
    without --enable-dyncp."""
    if any(values(field) is not None for field in BACKEND_FIELDS) or not latent and not has_slices(values):
        return {}
    backend = LATENT_BACKEND if latent and values("kv_cache_dtype") == QUANTISED_KV and not has_slices(values) else BACKEND
    logger.info("dyncp: --attention-backend %s (sharded steps run its kernels)", backend)
    return {"attention_backend": backend}


def complete_prefill_graph(values: Callable[[str], Any]) -> dict[str, bool]:
    """No prefill graphs where the user did not ask for them."""
    if values("cuda_graph_backend_prefill") is not None or values("disable_prefill_cuda_graph"):
        return {}
    logger.info("dyncp: --disable-prefill-cuda-graph (a captured prefill cannot tell a sharded step)")
    return {"disable_prefill_cuda_graph": True}


def find_card_refusal(sm: int) -> str | None:
    """The message for a card that sharded steps were not run on, or None. sm: compute capability, major * 10 + minor."""
    if sm == HOPPER_SM:
        return None
    return (
        f"a GPU of compute capability {sm // 10}.{sm % 10} does not work with --enable-dyncp: its kernels are built for and were run on "
        f"Hopper ({HOPPER_SM // 10}.{HOPPER_SM % 10}) alone"
    )


def find_quantised_kv_refusal(values: Callable[[str], Any], *, latent: bool = False) -> str | None:
    """The message for a server whose K/V the user asks to be quantised and that cannot have it, or None. `values(field)`: as resolved.
    latent: the model's attention is MLA."""
    if values("kv_cache_dtype") != QUANTISED_KV:
        return None
    refused = f"--kv-cache-dtype {QUANTISED_KV} does not work with --enable-dyncp"
    if values("device") != "cuda":
        return f"{refused} on --device {values('device')}: it is served on a GPU alone"
    served = (*QUANTISED_BACKENDS[latent], *((BACKEND,) if has_slices(values) else ()))  # slices are refused by their own words
    backends = {values(field) for field in BACKEND_FIELDS} - {None, *served}
    if backends:
        kind = "latent attention (MLA)" if latent else "this model"
        return f"{refused} and --attention-backend {min(backends)}: {kind} is served with {' or '.join(served)}"
    return None


def find_kv_type_refusal(kv_cache_dtype: Any, backend: str, *, latent: bool) -> str | None:
    """The message for the element type of a KV pool, which a checkpoint may decide (--kv-cache-dtype auto), or None.

    kv_cache_dtype: torch's. backend: the attention backend that runs over the pool. latent: the model's attention is MLA.
    """
    name = str(kv_cache_dtype).removeprefix("torch.")
    if name in ("bfloat16", "float16", "float32"):
        return None
    served = QUANTISED_BACKENDS[latent]
    refused = f"a KV pool of {name} (by --kv-cache-dtype, or by auto and this checkpoint) does not work with --enable-dyncp"
    if name != QUANTISED_KV_TYPE:
        return f"{refused}: of quantised types, {QUANTISED_KV_TYPE} alone is exchanged; give --kv-cache-dtype bfloat16"
    if backend in served:
        return None
    kind = "latent attention (MLA)" if latent else "this model"
    return f"{refused} and --attention-backend {backend}: {kind} is served with {' or '.join(served)}, or give --kv-cache-dtype bfloat16"


def find_sliced_kv_refusal(kv_cache_dtype: Any, slices: int) -> str | None:
    """The message for a quantised KV pool of instances of several slices, which a checkpoint may decide, or None."""
    name = str(kv_cache_dtype).removeprefix("torch.")
    if slices == 1 or not name.startswith("float8"):
        return None
    return (
        f"a KV pool of {name} (by --kv-cache-dtype, or by auto and this checkpoint) does not work with --enable-dyncp and attention TP "
        f"{slices}: it was not run with it on a GPU yet; give --kv-cache-dtype bfloat16"
    )


def find_cuda_refusal(values: Callable[[str], Any], *, latent: bool = False, transport: str = "auto") -> str | None:
    """The message for the first thing of a GPU server that is not served, or None. `values(field)` reads a resolved setting. latent: the
    model's attention is MLA. transport: --dyncp-transport."""
    refused = _find_backend_refusal(values) or (_find_latent_refusal(values) if latent else None)
    if refused is not None:
        return refused
    graphs = values("cuda_graph_config")
    if graphs is not None and graphs.prefill.backend != "disabled":
        return (
            f"--cuda-graph-backend-prefill {graphs.prefill.backend} does not work with --enable-dyncp: "
            "a captured prefill cannot tell a sharded step"
        )
    experts = _find_experts_refusal(values)
    if experts is not None:
        return experts
    for field in ("enable_torch_compile", "enable_deterministic_inference"):
        if values(field):
            flag = "--" + field.replace("_", "-")
            return f"{flag} {values(field)} does not work with --enable-dyncp on a GPU: it was not run with sharded rows"
    if values("debug_cuda_graph") and transport in ("auto", "peer"):
        return (
            f"--debug-cuda-graph True does not work with --enable-dyncp and --dyncp-transport {transport}: a replay runs Python, which "
            "cannot tell that the step has sharded rows; give --dyncp-transport nccl, which has no graphs for them"
        )
    if values("disable_cuda_graph_padding"):
        return (
            "--disable-cuda-graph-padding True does not work with --enable-dyncp on a GPU: all instances replay a sharded step as a graph, "
            "and a batch of no captured size would run without one"
        )
    return None


def _find_experts_refusal(values: Callable[[str], Any]) -> str | None:
    """The message for an expert all-to-all that is not served, or None."""
    backend = values("moe_a2a_backend")
    if backend in (None, *EXPERT_BACKENDS):
        return None
    return f"--moe-a2a-backend {backend} does not work with --enable-dyncp on a GPU: it was not run with sharded rows"


def find_untried(values: Callable[[str], Any]) -> str | None:
    """What is served on a GPU and was not run on one, or not so, or None."""
    if has_slices(values):
        size = values("tp_size") // values("attn_dp_size")
        return f"attention TP {size}: what ran are two slices of each of two instances, all on one GPU (docs/gpu.md)"
    backend = values("moe_a2a_backend")
    if backend in (None, "none") or values("moe_dense_tp_size") != 1 or not values("enable_dp_lm_head"):
        return None
    return (
        f"--moe-dense-tp-size 1 with --enable-dp-lm-head and --moe-a2a-backend {backend} was not run on a GPU with sharded rows: every "
        "instance replays the decode graph of its own batch size (docs/gpu.md)"
    )


def _find_backend_refusal(values: Callable[[str], Any]) -> str | None:
    """One backend for prefill and decode alike, of those whose place ours can take."""
    backend = values("attention_backend") or BACKEND
    for field in BACKEND_FIELDS:
        value, flag = values(field), "--" + field.replace("_", "-")
        if value not in (None, *BACKENDS):
            return f"{flag} {value} does not work with --enable-dyncp on a GPU: sharded steps need {' or '.join(BACKENDS)}"
        if value not in (None, backend):
            return f"{flag} {value} does not work with --enable-dyncp beside --attention-backend {backend}: give one for both"
    return None


def _find_latent_refusal(values: Callable[[str], Any]) -> str | None:
    for field in BACKEND_FIELDS:
        if values(field) == DEFAULT_BACKEND:
            flag = "--" + field.replace("_", "-")
            return (
                f"{flag} {DEFAULT_BACKEND} does not work with --enable-dyncp for a model with latent attention (MLA): it was not run "
                f"beside sharded steps; give {BACKEND} or flashmla"
            )
    return None


def find_transport_refusal(transport: str, device: str) -> str | None:
    """The message for a --dyncp-transport that this device does not have, or None."""
    there = CPU_TRANSPORTS if device == "cpu" else CUDA_TRANSPORTS
    if transport in there:
        return None
    return f"--dyncp-transport {transport} is not there on --device {device}; choose one of {', '.join(there)}"
