"""What a home tells prefill servers: the pools of all instances once, and of each request where its shards' pages lie."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from sglang_dcp.upstream.disaggregation.destinations import SESSION, page_lists
from sglang_dcp.upstream.disaggregation.meeting import find_width_refusal, refuse
from sglang_dcp.upstream.step.attached import after, around
from sglang_dcp.upstream.step.runtime import Runtime


@after
def register_all(runtime: Runtime, result: bool, receiver: Any) -> bool:
    """AFTER CommonKVReceiver._register_kv_args: a prefill server that meets this instance learns of all pools."""
    if not result or runtime.destinations is None:
        return result
    return all(
        receiver._send_bootstrap_message(bootstrap_info=server, message=destination.registration, operation="_register_kv_args")
        for destination in runtime.destinations.others
        for server in receiver.bootstrap_infos or ()
    )


@around
def send_metadata(
    runtime: Runtime,
    original: Callable[..., None],
    receiver: Any,
    kv_indices: np.ndarray,
    aux_index: int | None = None,
    state_indices: Any = None,
    decode_prefix_len: int | None = None,
    **call: Any,
) -> None:
    """AROUND CommonKVReceiver.send_metadata: one message per shard of the request and prefill rank."""
    lists = page_lists(runtime.participant.ids, kv_indices)
    if len(lists) == 1 or not receiver.bootstrap_infos or receiver.conclude_state is not None:
        original(receiver, kv_indices, aux_index, state_indices, decode_prefix_len, **call)
        return
    assert runtime.destinations is not None
    if (message := find_width_refusal(receiver.kv_mgr, receiver.prefill_info)) is not None:
        refuse(receiver, message)
        return
    receiver.required_dst_info_num *= len(lists)
    original(receiver, lists.pop(runtime.participant.rank), aux_index, state_indices, decode_prefix_len, **call)
    for rank, pages in lists.items():
        destination = runtime.destinations.of[rank]
        for server in receiver.bootstrap_infos:
            message = receiver.kv_mgr.build_receiver_metadata_message(
                bootstrap_room=receiver.bootstrap_room,
                required_dst_info_num=receiver.required_dst_info_num,
                kv_indices=pages,
                aux_index=destination.slot,
                state_indices=state_indices,
                decode_prefix_len=decode_prefix_len,
                is_dummy=server["is_dummy"],
            )
            message[SESSION] = destination.session
            if not receiver._send_bootstrap_message(bootstrap_info=server, message=message, operation="send_metadata"):
                receiver.invalidate_cached_bootstrap_infos()
                return
