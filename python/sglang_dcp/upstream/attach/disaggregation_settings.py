"""Settings of a decode server behind prefill servers (--disaggregation-mode decode)."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)

BACKENDS = ("fake", "mooncake", "mooncake_tcp")
"""Of --disaggregation-transfer-backend. SGLang resolves the last to the one before it."""

NEEDED: tuple[tuple[str, Any, str], ...] = (
    ("disaggregation_decode_enable_radix_cache", False, "sharded requests stay out of that tree; --dyncp-cache-fraction keeps their pages"),
    ("disaggregation_decode_enable_offload_kvcache", False, "host copies of remote pages do not exist"),
    ("disaggregation_decode_retraction_backup", "cpu_tensor", "a retracted request is prefilled again, its remote pages have no host copy"),
    ("disaggregation_decode_host_receive_threshold", 1, "K/V is received where it is attended, not on the host"),
    ("disaggregation_decode_allocation_policy", "early", "pages are reserved before the prefill server begins to send"),
    ("disaggregation_enable_kv_checksum", False, "an instance reads its own pages alone"),
    ("enable_pd_role_switch", False, "pools and books last as long as the server"),
)
"""(field, the one value that works on a decode server, why)."""


def find_decode_refusal(values: Callable[[str], Any], *, staging: bool = False) -> str | None:
    """The message for a setting of a decode server that does not work with --enable-dyncp, or None, as for any other server.

    staging: SGLANG_DISAGG_STAGING_BUFFER. A field that SGLang has yet to decide is None.
    """
    if values("disaggregation_mode") != "decode":
        return None
    if staging:
        return "SGLANG_DISAGG_STAGING_BUFFER=1 does not work with --enable-dyncp: staged K/V is spread over the pool of one instance"
    backend = values("disaggregation_transfer_backend")
    if backend is not None and backend not in BACKENDS:
        what = f"those that carry a request to several instances are {', '.join(BACKENDS)}"
        return f"--disaggregation-transfer-backend {backend} does not work with --enable-dyncp: {what}"
    for field, works, reason in NEEDED:
        value = values(field)
        if value is not None and value != works:
            return f"--{field.replace('_', '-')} {value} does not work with --enable-dyncp on a decode server: {reason}"
    return None


def find_window_refusal(mode: str, architecture: str) -> str | None:
    """The message for a decode server of a model with window layers, or None."""
    if mode != "decode":
        return None
    return (
        f"--disaggregation-mode decode does not work with --enable-dyncp for {architecture}: prefill servers keep the K/V of window layers "
        "in a pool of its own, which was not run against the one pool here"
    )


def complete_decode(values: Callable[[str], Any]) -> dict[str, Any]:
    """SGLang would set a host pool aside for retracted requests, and on a CPU could not: here none is copied."""
    if values("disaggregation_mode") != "decode" or values("disaggregation_decode_retraction_backup") is not None:
        return {}
    logger.info("dyncp: --disaggregation-decode-retraction-backup cpu_tensor (retracted requests are prefilled again)")
    return {"disaggregation_decode_retraction_backup": "cpu_tensor"}
