"""Settings of a GPU server: what is completed and what is refused."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)

BACKEND = "flashinfer"
PLAIN_BACKEND = "torch_native"
"""Serves GQA of any element type, slowly and without graphs: what float32 is compared with."""
BACKENDS = (BACKEND, "flashmla", PLAIN_BACKEND)
BACKEND_FIELDS = ("attention_backend", "prefill_attention_backend", "decode_attention_backend")
CUDA_TRANSPORTS = ("auto", "peer", "nccl", "gloo")
CPU_TRANSPORTS = ("auto", "gloo")


def complete_attention_backend(values: Callable[[str], Any]) -> dict[str, str]:
    """FlashInfer where the user named no backend: SGLang's own default on a Hopper GPU is another one."""
    if any(values(field) is not None for field in BACKEND_FIELDS):
        return {}
    logger.info("dyncp: --attention-backend %s (sharded steps run its kernels)", BACKEND)
    return {"attention_backend": BACKEND}


def complete_prefill_graph(values: Callable[[str], Any]) -> dict[str, bool]:
    """No prefill graphs where the user did not ask for them."""
    if values("cuda_graph_backend_prefill") is not None or values("disable_prefill_cuda_graph"):
        return {}
    logger.info("dyncp: --disable-prefill-cuda-graph (a captured prefill cannot tell a sharded step)")
    return {"disable_prefill_cuda_graph": True}


def find_cuda_refusal(values: Callable[[str], Any]) -> str | None:
    """The message for the first thing of a GPU server that is not served, or None. `values(field)` reads a resolved setting."""
    refused = _find_backend_refusal(values)
    if refused is not None:
        return refused
    graphs = values("cuda_graph_config")
    if graphs is not None and graphs.prefill.backend != "disabled":
        return (
            f"--cuda-graph-backend-prefill {graphs.prefill.backend} does not work with --enable-dyncp: "
            "a captured prefill cannot tell a sharded step"
        )
    for field in ("moe_a2a_backend", "enable_torch_compile", "enable_deterministic_inference"):
        value = values(field)
        if value not in ("none", None, False):
            flag = "--" + field.replace("_", "-")
            return f"{flag} {value} does not work with --enable-dyncp on a GPU: it was not run with sharded rows"
    return None


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


def find_transport_refusal(transport: str, device: str) -> str | None:
    """The message for a --dyncp-transport that this device does not have, or None."""
    there = CPU_TRANSPORTS if device == "cpu" else CUDA_TRANSPORTS
    if transport in there:
        return None
    return f"--dyncp-transport {transport} is not there on --device {device}; choose one of {', '.join(there)}"
