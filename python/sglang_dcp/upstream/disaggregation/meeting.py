"""A home meets a prefill server: one that cannot fill the pools of this decode server has its requests refused, and nobody else's."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from sglang_dcp.upstream.step.attached import around
from sglang_dcp.upstream.step.runtime import Runtime

logger = logging.getLogger(__name__)

Waiting = dict[str, list[Any]]


@around
def meet_prefill_servers(
    runtime: Runtime, original: Callable[..., tuple[Waiting, list[Any]]], queue: Any, addr_to_reqs: Waiting
) -> tuple[Waiting, list[Any]]:
    """AROUND DecodePreallocQueue._ensure_prefill_info: SGLang raises for a prefill server of other pages, K/V or parallelism than these, in
    the scheduler, which ends the server with all that it decodes."""
    met: Waiting = {}
    later: list[Any] = []
    for address, entries in addr_to_reqs.items():
        try:
            now, still = original(queue, {address: entries})
        except (RuntimeError, AssertionError) as error:
            message = f"prefill server {address}: {error}"
            logger.error("dyncp: %s", message)
            # Asked again for the next request: it may have been restarted with other flags.
            queue._ensure_last_attempt_time.pop(address, None)
            for entry in entries:
                refuse(entry.kv_receiver, message)
            continue
        met |= now
        later += still
    return met, later


def refuse(receiver: Any, message: str) -> None:
    """The request ends with it at the next poll, HTTP 503. receiver: SGLang's, or None if it has ended already."""
    from sglang.srt.disaggregation.base import KVPoll

    if receiver is not None:
        receiver.kv_mgr.record_failure(receiver.bootstrap_room, message)
        receiver.kv_mgr.update_status(receiver.bootstrap_room, KVPoll.Failed)
        receiver.conclude_state = KVPoll.Failed


def find_width_refusal(manager: Any, prefill: Any) -> str | None:
    """The message for a prefill server whose ranks hold some K/V heads each, or None. manager: of this side; prefill: SGLang's record."""
    if manager.is_mla_backend or prefill.attn_tp_size == manager.attn_tp_size:
        return None
    return (
        f"the prefill server has attention tensor parallelism {prefill.attn_tp_size}: with --enable-dyncp the K/V heads of GQA are sent "
        f"whole (start it with --attn-dp-size equal to --tp)"
    )
